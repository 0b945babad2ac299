"""The time of every public call as the numbers of adapters and layers grow: no call may grow faster than they do.

    python -m benchmarks.growth
    python -m benchmarks.growth --only merge use_adapters --adapters 20 80

Each call is timed beside 10, 40 and 160 adapters on 8 layers, and on networks of 50, 200 and 800 layers with 2
adapters: medians of this process's processor time, since the machine may be shared. Layers are so small that arithmetic
takes no time. The growth is the exponent between the two larger sizes: 1 if twice as many take twice the time, 0 if
they take the same. ``tests/test_growth.py`` counts function calls instead, which other load does not change.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import convlora

ADAPTERS, LAYERS = (10, 40, 160), (50, 200, 800)
FEW_LAYERS, FEW_ADAPTERS = 8, 2
LINEAR = 1.2
"""The exponent above which a call is reported: 1, plus the machine's noise."""
ELSEWHERE = {
    "adopt": "a new head in the place of an only adapter's",
    "push_to_hub": "save_adapter, and an upload",
    "register": "touches no model",
    "register_method": "touches no model",
}
"""Public functions that are not timed, with reasons."""


class Shift(nn.Module):
    """A module with a buffer, of which each adapter has its own."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Add the buffer to a tensor of any shape."""
        return x + self.shift


class Chain(nn.Module):
    """Convolutions with batch norms, a module with a buffer, and a head."""

    def __init__(self, layers: int, groups: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(4, 4, 3, padding=1, groups=groups) for _ in range(layers)]
        self.features = nn.Sequential(*(nn.Sequential(each, nn.BatchNorm2d(4)) for each in convolutions))
        self.shift = Shift()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, 2)`` of images ``(N, 4, 3, 3)``."""
        y: Tensor = self.fc(self.shift(self.features(x).mean((2, 3))))
        return y


@dataclass
class Subject:
    """The objects that calls use."""

    base: nn.Module
    model: nn.Module
    names: list[str]
    """Names of the model's adapters; the first is active."""
    folder: Path
    """The first adapter as convlora's file, and under ``peft`` as peft's, with an alpha for each layer."""
    other: Any = None
    """An object that a case has prepared for its call."""

    @property
    def images(self) -> Tensor:
        """One image for each adapter."""
        return torch.ones(len(self.names), 4, 3, 3)


def nothing(_: Subject) -> None:
    """No preparation, or nothing to undo."""


@dataclass(frozen=True)
class Case:
    """A call, with its untimed preparation and cleaning up, and the model that it uses."""

    call: Callable[[Subject], object]
    before: Callable[[Subject], object] = nothing
    after: Callable[[Subject], object] = nothing
    options: dict[str, Any] = field(default_factory=dict)
    """Options of every adapter."""
    groups: int = 1
    """Groups of every convolution."""
    is_of_adapters: bool = True
    """Whether the model has other adapters during the call."""


def a_copy(subject: Subject) -> None:
    """Prepare a copy of the model that the call may change."""
    subject.other = copy.deepcopy(subject.model)


def prepared(subject: Subject) -> None:
    """Prepare a copy that is ready for hot swaps."""
    a_copy(subject)
    convlora.prepare_for_hotswap(subject.other, 2)


def add(subject: Subject) -> None:
    """Add an adapter."""
    convlora.add_adapter(subject.model, "new", 1)


def delete(subject: Subject) -> None:
    """Delete the added adapter."""
    convlora.delete_adapter(subject.model, "new")


def step(model: nn.Module, images: Tensor) -> None:
    """A training step without the optimizer."""
    model(images).sum().backward()


def routed(subject: Subject) -> None:
    """A batch with a sample for each adapter, so small that layers add a branch for each sample."""
    with convlora.use_adapters(subject.model, subject.names), torch.inference_mode():
        subject.model(subject.images[..., :1, :1])


def in_turn(subject: Subject) -> None:
    """A batch with so many positions that layers take the adapters one after another."""
    with convlora.use_adapters(subject.model, subject.names), torch.inference_mode():
        subject.model(subject.images)


def scaled(subject: Subject) -> None:
    """Enter and leave a block at half strength."""
    with convlora.scaled(subject.model, 0.5):
        pass


def opened(subject: Subject) -> None:
    """Enter and leave a block without a forward."""
    with convlora.use_adapters(subject.model, subject.names):
        pass


def disabled(subject: Subject) -> None:
    """Enter and leave a block with the base alone."""
    with convlora.disable_adapter(subject.model):
        pass


def inferred(subject: Subject) -> None:
    """A forward whose weights have not changed."""
    with torch.inference_mode():
        subject.model(subject.images[:1])


def combine(method: Any, **options: Any) -> Callable[[Subject], object]:
    """Combine all adapters into one."""
    return lambda s: convlora.combine_adapters(s.model, dict.fromkeys(s.names, 0.5), "new", method=method, **options)


def each_layer(subject: Subject) -> dict[Any, int]:
    """A number for each convolution by its name."""
    return {name: 1 for name, module in subject.base.named_modules() if isinstance(module, nn.Conv2d)}


def to_peft(subject: Subject) -> None:
    """Prepare the model in peft; needs peft."""
    import convlora.peft as bridge

    subject.other = bridge.to_peft(copy.deepcopy(subject.model))


def from_peft(subject: Subject) -> None:
    """And back."""
    import convlora.peft as bridge

    bridge.from_peft(subject.other)


def tuned(subject: Subject) -> None:
    """Prepare a full fine-tuning of the base."""
    subject.other = copy.deepcopy(subject.base)
    with torch.no_grad():
        for parameter in subject.other.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Any."""
    total: Tensor = model(batch).sum()
    return total


def back(subject: Subject) -> None:
    """Remove the adapters from the base."""
    convlora.remove(subject.base)


ALONE: dict[str, Any] = {"is_of_adapters": False}
CASES: dict[str, Case] = {
    "plan": Case(lambda s: str(convlora.plan(s.base, 1)), **ALONE),
    "plan, a rank and an alpha for each layer": Case(
        lambda s: convlora.plan(s.base, 1, rank_pattern=each_layer(s), alpha_pattern=each_layer(s)), **ALONE
    ),
    "plan, each layer named": Case(lambda s: convlora.plan(s.base, 1, target_modules=list(each_layer(s))), **ALONE),
    "plan, a budget": Case(lambda s: convlora.plan(s.base, 1, budget="20%", importance=each_layer(s)), **ALONE),
    "inject": Case(lambda s: convlora.inject(s.base, 1), after=back, **ALONE),
    "inject, tracked norms": Case(lambda s: convlora.inject(s.base, 1, norm="track"), after=back, **ALONE),
    "inject, eva": Case(lambda s: convlora.inject(s.base, 1, init="eva", init_data=[s.images]), after=back, **ALONE),
    "inject, masks": Case(lambda s: convlora.inject(s.base, 1, mask_activations=True), after=back, **ALONE),
    "saved_bytes": Case(lambda s: convlora.saved_bytes(s.base, s.images), **ALONE),
    "sensitivity": Case(lambda s: convlora.sensitivity(s.base, [s.images], loss), **ALONE),
    "extract": Case(lambda s: convlora.extract(s.base, s.other, 1), tuned, back, **ALONE),
    "to_peft": Case(to_peft, **ALONE),
    "from_peft": Case(from_peft, to_peft, **ALONE),
    "add_adapter": Case(add, after=delete),
    "delete_adapter": Case(delete, before=add),
    "set_adapter": Case(
        lambda s: convlora.set_adapter(s.model, s.names[1]), after=lambda s: convlora.set_adapter(s.model, s.names[0])
    ),
    "set_adapter, tracked norms": Case(
        lambda s: convlora.set_adapter(s.model, s.names[1]),
        after=lambda s: convlora.set_adapter(s.model, s.names[0]),
        options={"norm": "track"},
    ),
    "set_adapter, all at once": Case(
        lambda s: convlora.set_adapter(s.model, s.names), after=lambda s: convlora.set_adapter(s.model, s.names[0])
    ),
    "scaled": Case(scaled),
    "set_scale": Case(lambda s: convlora.set_scale(s.model, s.names[0], 1)),
    "disable_adapter": Case(disabled),
    "use_adapters": Case(opened),
    "use_adapters, forward": Case(routed),
    "use_adapters, forward, in turn": Case(in_turn),
    "use_adapters, forward, grouped layers": Case(routed, groups=2),
    "use_adapters, forward, tracked norms": Case(routed, options={"norm": "track"}),
    "use_adapters, forward, DoRA": Case(routed, options={"use_dora": True}),
    "forward": Case(inferred),
    "forward and backward": Case(lambda s: step(s.model, s.images[:1])),
    "merge": Case(lambda s: convlora.merge(s.model), after=lambda s: convlora.unmerge(s.model)),
    "unmerge": Case(lambda s: convlora.unmerge(s.model), before=lambda s: convlora.merge(s.model)),
    "remove": Case(lambda s: convlora.remove(s.other), before=a_copy),
    "check": Case(lambda s: convlora.check(s.model)),
    "summary": Case(lambda s: str(convlora.summary(s.model))),
    "adapter_parameters": Case(lambda s: list(convlora.adapter_parameters(s.model))),
    "trainable_parameters": Case(lambda s: list(convlora.trainable_parameters(s.model))),
    "parameter_groups": Case(lambda s: convlora.parameter_groups(s.model, lr=1e-3)),
    "base_weight": Case(lambda s: [convlora.base_weight(s.model.get_submodule(name)) for name in each_layer(s)]),
    "save_adapter": Case(lambda s: convlora.save_adapter(s.model, s.folder / "saved")),
    "save_adapter, tracked norms": Case(
        lambda s: convlora.save_adapter(s.model, s.folder / "saved"), options={"norm": "track"}
    ),
    "save_adapter, other alphas": Case(
        lambda s: convlora.save_adapter(s.model, s.folder / "saved"), options={"alpha_pattern": {"*.*[13579].0": 3}}
    ),
    "export_adapter": Case(
        lambda s: convlora.export_adapter(s.model, s.folder / "exported.safetensors", "lycoris"),
        options={"modules_to_save": None},
    ),
    "load_adapter": Case(lambda s: convlora.load_adapter(s.model, s.folder, "new"), after=delete),
    "load_adapter, peft's with an alpha for each layer": Case(
        lambda s: convlora.load_adapter(s.model, s.folder / "peft", "new"), after=delete
    ),
    "prepare_for_hotswap": Case(lambda s: convlora.prepare_for_hotswap(s.other, 2), before=a_copy),
    "hotswap_adapter": Case(lambda s: convlora.hotswap_adapter(s.other, s.folder), before=prepared),
    "combine_adapters, SVD": Case(combine("svd", rank=1), after=delete),
    "combine_adapters, TIES": Case(combine("ties", rank=1, density=0.5), after=delete),
    "shrink": Case(lambda s: convlora.shrink(s.other, energy=0.9), before=a_copy),
    "deepcopy": Case(lambda s: copy.deepcopy(s.model)),
    "state_dict": Case(lambda s: s.model.state_dict()),
}
"""The timed calls by their names in the table: a public function, and its options after a comma."""


@contextmanager
def made(adapters: int, layers: int, groups: int, options: dict[str, Any]) -> Iterator[Subject]:
    """A network with these numbers of layers and adapters, with random weights."""
    torch.manual_seed(0)
    base = Chain(layers, groups).eval()
    model, names = copy.deepcopy(base), [f"a{index}" for index in range(adapters)]
    convlora.inject(model, 1, adapter_name=names[0], **options)
    for name in names[1:]:
        convlora.add_adapter(model, name, 1, **options)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".convlora." in key:
                nn.init.normal_(parameter, std=0.1)
        for index, name in enumerate(names if options.get("norm") == "track" else ()):
            convlora.set_adapter(model, name)
            for buffer in (b for key, b in model.named_buffers() if key.endswith(("running_mean", "shift"))):
                buffer.fill_(index)
        convlora.set_adapter(model, names[0])
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(base, model, names, Path(folder))
        convlora.save_adapter(model, folder)
        as_peft(subject)
        yield subject


def as_peft(subject: Subject) -> None:
    """Save the adapter in peft's format, with an alpha for each layer."""
    source, target = subject.folder, subject.folder / "peft"
    target.mkdir()
    save_file(load_file(source / "adapter_model.safetensors"), target / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text())
    config |= {"peft_type": "CONVLORA", "alpha_pattern": each_layer(subject)}
    (target / "adapter_config.json").write_text(json.dumps(config))


def seconds(case: Case, subject: Subject, times: int) -> float:
    """The median of the processor seconds of one call."""
    found = []
    for _ in range(times + 1):
        case.before(subject)
        gc.collect()
        gc.disable()
        try:
            start = time.process_time()
            case.call(subject)
            found.append(time.process_time() - start)
        finally:
            gc.enable()
        case.after(subject)
    return statistics.median(found[1:])  # the first fills caches


def exponent(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """The exponent of the cost's growth between the two largest sizes."""
    return math.log(costs[-1] / costs[-2]) / math.log(sizes[-1] / sizes[-2])


def along(axis: str, size: int) -> tuple[int, int]:
    """The numbers of adapters and layers: ``size`` along the axis, a few of the other."""
    return (size, FEW_LAYERS) if axis == "adapters" else (FEW_ADAPTERS, size)


def measured(
    axis: str, sizes: Sequence[int], names: Iterable[str], cost: Callable[[Case, Subject], float]
) -> dict[str, list[float]]:
    """The seconds of each call at each size."""
    found: dict[str, list[float]] = {name: [] for name in names if axis == "layers" or CASES[name].is_of_adapters}
    kinds: list[tuple[int, dict[str, Any]]] = []  # of models, each of which serves several calls
    for name in found:
        kinds += [kind] if (kind := (CASES[name].groups, CASES[name].options)) not in kinds else []
    for size in sizes:
        for groups, options in kinds:
            with made(*along(axis, size), groups, options) as subject:
                for name in found:
                    if (CASES[name].groups, CASES[name].options) == (groups, options):
                        found[name].append(cost(CASES[name], subject))
    return found


def table(axis: str, sizes: Sequence[int], found: dict[str, list[float]]) -> str:
    """A table with a line for each call, in milliseconds, and the calls that grow too fast."""
    lines = [f"| with more {axis} |" + "".join(f" {size} |" for size in sizes) + " growth |"]
    lines += ["|---|" + "--:|" * (len(sizes) + 1)]
    for name, costs in found.items():
        times = "".join(f" {1e3 * each:,.2f} |" for each in costs)
        lines += [f"| {name} |{times} {exponent(sizes, costs):.2f} |"]
    steep = [f"{name} ({power:.2f})" for name, costs in found.items() if (power := exponent(sizes, costs)) > LINEAR]
    return "\n".join([*lines, "", f"Milliseconds. Faster than {axis} grow: {', '.join(steep) or 'none'}.", ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the options and do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="calls by their beginning; default all")
    parser.add_argument("--adapters", nargs="*", type=int, default=ADAPTERS)
    parser.add_argument("--layers", nargs="*", type=int, default=LAYERS)
    parser.add_argument("--times", type=int, default=5, help="of each call")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    names = [name for name in CASES if not options.only or name.startswith(tuple(options.only))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for axis in ("adapters", "layers"):
            if sizes := getattr(options, axis):
                found = measured(axis, sizes, names, lambda case, subject: seconds(case, subject, options.times))
                print(table(axis, sizes, found), flush=True)


if __name__ == "__main__":
    main()
