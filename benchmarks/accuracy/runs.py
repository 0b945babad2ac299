"""Runs, each one training of a method on a task with a learning rate and a seed, and their results as JSON lines."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

import convlora
from benchmarks.overhead import measuring
from benchmarks.overhead.peers import their_warnings_aside
from benchmarks.overhead.subjects import NotAvailable
from examples.histopathology.runs import rates

from .arms import Arm
from .data import SHIFTS, Images, Splits, few
from .training import Recipe, accuracy, batches, constant_statistics, fit, predict


@dataclass(frozen=True)
class Key:
    """The identity of a run."""

    backbone: str
    task: str
    """``all``, or ``few-N``: N images of each class."""
    arm: str
    lr: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """The result of a run; accuracies are shares, times are seconds, sizes are bytes."""

    key: Key
    validation: float = 0.0
    test: float = 0.0
    shifted: dict[str, float] = field(default_factory=dict)
    trainable: int = 0
    share: float = 0.0
    """The trainable share of the base's parameters, the head included."""
    seconds: float = 0.0
    """Processor seconds of all training steps, without data loading."""
    saved: int = 0
    """Bytes kept by autograd for one batch of 32."""
    file: int = 0
    checked: str = ""
    """The result of saving, loading and merging."""
    unavailable: str = ""
    threads: int = 0
    """Threads of the training."""

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Outcome:
        """The outcome from ``asdict``'s values."""
        return cls(**{**data, "key": Key(**data["key"])})


def read(path: Path) -> list[Outcome]:
    """Read the outcomes so far; an unfinished last line is ignored."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [Outcome.from_json(json.loads(line)) for line in lines[:-1] if line]


def mend(path: Path) -> None:
    """Cut off an unfinished last line of a killed run; call it while no run writes."""
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")


def append(path: Path, outcome: Outcome) -> None:
    """Append one line in one write, since several processes may write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(outcome)) + "\n")


FIRST = 8
"""The number of batches that a method may use while it is built."""

Make = Callable[[int], tuple[nn.Module, float, float]]
"""Makes a pretrained network with a head drawn by a seed, and returns the mean and deviation of its input too."""


@dataclass
class Work:
    """The data and settings that the runs of one backbone share."""

    backbone: str
    make: Make
    splits: Splits
    epochs: int
    features: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    """The frozen network's features of each batch, by task and seed; they are the same at every learning rate."""

    def images(self, task: str, seed: int) -> Images:
        """The training images."""
        return self.splits.train if task == "all" else few(self.splits.train, int(task.removeprefix("few-")), seed)

    def run(self, arm: Arm, task: str, lr: float, seed: int) -> Outcome:
        """Train, evaluate and check one method."""
        key = Key(self.backbone, task, arm.name, lr, seed)
        base, mean, std = self.make(seed)
        parameters = sum(p.numel() for p in base.parameters())
        images, recipe = self.images(task, seed), Recipe(lr, self.epochs)
        first = [((x - mean) / std, y) for x, y in islice(batches(images, recipe, seed), FIRST)]
        try:
            with their_warnings_aside():
                model = arm.build(base, first)
        except (NotAvailable, convlora.ConvLoraError) as reason:
            return Outcome(key, unavailable=str(reason).splitlines()[0])
        model.train() if arm.tracks or arm.is_adapter else constant_statistics(model)
        torch.manual_seed(seed)
        if arm.name == "probe":
            seconds = self._fit_head(model, task, images, recipe, seed, mean, std)
        else:
            seconds = fit(model, images, recipe, seed, mean, std, ratio=arm.ratio)
        test, validation = self.splits.test, self.splits.validation
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return Outcome(
            key,
            validation=accuracy(model, validation, mean, std),
            test=accuracy(model, test, mean, std),
            shifted={n: accuracy(model, Images(f(test.x), test.y), mean, std) for n, f in SHIFTS.items()},
            trainable=trainable,
            share=trainable / parameters,
            seconds=seconds,
            saved=_saved(model, arm, images, mean, std),
            threads=torch.get_num_threads(),
            **self._checked(model, arm, seed, mean, std),
        )

    def _fit_head(
        self, model: nn.Module, task: str, images: Images, recipe: Recipe, seed: int, mean: float, std: float
    ) -> float:
        """Train as ``fit`` does, but run the frozen network once for all learning rates."""
        (name,) = convlora.summary(model).modules_to_save
        head = model.get_submodule(name)
        if (task, seed) not in self.features:
            seen: list[Tensor] = []
            hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
            labels = []
            with torch.no_grad():
                for x, y in batches(images, recipe, seed):
                    model((x - mean) / std)
                    labels.append(y)
            hook.remove()
            self.features[task, seed] = list(zip(seen, labels, strict=True))
        return fit(head, images, recipe, seed, 0.0, 1.0, self.features[task, seed])

    def _checked(self, model: nn.Module, arm: Arm, seed: int, mean: float, std: float) -> dict[str, Any]:
        """Save, load into a fresh network and merge, and compare the predictions; also gives the file's size."""
        x = self.splits.validation.x[:100]
        before = predict(model, x, mean, std)
        if not arm.is_adapter:
            tensors = {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}
            tensors |= {n: b.contiguous() for n, b in model.named_buffers()} if arm.tracks else {}
            return {"file": len(save(tensors)), "checked": "not an adapter of this library"}
        with tempfile.TemporaryDirectory() as place:
            path = convlora.save_adapter(model, Path(place) / "adapter")
            size = sum(file.stat().st_size for file in path.iterdir())
            loaded = convlora.load_adapter(self.make(seed)[0], path)
        reload = "reload bit-equal" if torch.equal(predict(loaded, x, mean, std), before) else "RELOAD DIFFERS"
        if not convlora.summary(model).layers:
            return {"file": size, "checked": f"{reload}, nothing to merge"}
        off = (predict(convlora.merge(model), x, mean, std) - before).abs().max() / before.abs().max()
        return {"file": size, "checked": f"{reload}, merge within {float(off):.0e}"}


def _saved(model: nn.Module, arm: Arm, images: Images, mean: float, std: float) -> int:
    model.train() if arm.tracks or arm.is_adapter else constant_statistics(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    x, y = images.x[:32], images.y[:32]
    own = [*model.parameters(), *model.buffers()]
    try:
        return measuring.saved_bytes(lambda: F.cross_entropy(_answer(model((x - mean) / std)), y), own)
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


def _answer(found: Any) -> Tensor:
    answer: Tensor = getattr(found, "logits", found)
    return answer


def best_lr(outcomes: Iterable[Outcome], backbone: str, task: str, arm: str, seed: int) -> float | None:
    """The learning rate with the best validation accuracy in the sweep, the smaller of equals; None before a sweep."""
    there = [o for o in outcomes if (o.key.backbone, o.key.task, o.key.arm, o.key.seed) == (backbone, task, arm, seed)]
    there = [outcome for outcome in there if not outcome.unavailable]
    return min(there, key=lambda o: (-o.validation, o.key.lr)).key.lr if there else None


@dataclass(frozen=True)
class Sweep:
    """The learning rates and seeds that every method gets."""

    lrs: tuple[float, ...]
    """Learning rates in ascending order, each the same factor above the one before."""
    seeds: int
    further: int = rates.FURTHER
    """The most rates tried beyond an end of the sweep, while the best rate is there."""

    def beyond(self, tried: Collection[float], best: float) -> float | None:
        """The rate to try next; None if the best has neighbours on both sides, or enough rates were tried."""
        return None if len(tried) >= len(self.lrs) + self.further else rates.beyond(tried, best)


def missing(work: Work, task: str, arm: Arm, sweep: Sweep, known: Iterable[Outcome]) -> Iterator[Outcome]:
    """A method's runs without results: the sweep at the first seed, then the best rate at the other seeds."""
    found = {outcome.key: outcome for outcome in known}
    here = [k.lr for k in found if (k.backbone, k.task, k.arm, k.seed) == (work.backbone, task, arm.name, 0)]
    lrs = list(dict.fromkeys([*sweep.lrs, *here]))  # an interrupted run may have tried rates beyond an end

    def ask(lr: float, seed: int) -> Iterator[Outcome]:
        key = Key(work.backbone, task, arm.name, lr, seed)
        if key not in found:
            found[key] = work.run(arm, task, lr, seed)
            yield found[key]

    def best() -> float | None:
        return best_lr(found.values(), work.backbone, task, arm.name, 0)

    for lr in lrs:
        yield from ask(lr, 0)
    while (chosen := best()) is not None and (further := sweep.beyond(lrs, chosen)) is not None:
        lrs.append(further)
        yield from ask(further, 0)
    if chosen is not None:  # None: the method is not available here
        for seed in range(1, sweep.seeds):
            yield from ask(chosen, seed)


def reported(outcomes: list[Outcome], sweep_seed: int = 0) -> Iterator[Outcome]:
    """The outcomes of each seed at the learning rate that the sweep chose."""
    chosen: dict[tuple[str, str, str], float | None] = {}
    for outcome in outcomes:
        key = outcome.key
        name = (key.backbone, key.task, key.arm)
        if name not in chosen:
            chosen[name] = best_lr(outcomes, *name, sweep_seed)
        if not outcome.unavailable and key.lr == chosen[name]:
            yield outcome
