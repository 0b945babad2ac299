"""``convlora bench``: time and memory of an adapter on this machine, beside full fine-tuning and the base alone.

The variants take one step each in turn, round after round, so that other load on the machine affects all of them; a
ratio compares two steps of the same round. ``python -m benchmarks.overhead`` in the repository also measures peak
memory and other libraries.
"""

from __future__ import annotations

import copy
import os
import platform
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._model.inject import inject
from .._model.merge import merge
from .._model.remove import remove
from .answers import Answer, CommandError, table
from .measuring import Quartiles, interleave, ratios, saved_bytes, seconds
from .models import build
from .options import Adapting, Building, Measuring

FULL, ADAPTER = "full fine-tuning", "adapter"
BASE, UNMERGED, MERGED = "base alone", "adapter, unmerged", "merged and removed"
Times = dict[str, list[float]]


def bench(model: str, building: Building, adapting: Adapting, measuring: Measuring) -> Answer:
    """Measure a training step and a forward of the adapter, of full fine-tuning and of the base."""
    if measuring.threads is not None:
        torch.set_num_threads(measuring.threads)
    where, rounds = _device(measuring.device), measuring.rounds
    base = build(model, building).model.to(where)
    shape = (measuring.batch, measuring.channels, measuring.size, measuring.size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(where)
    adapted = inject(copy.deepcopy(base), **adapting.arguments())
    trained = [(FULL, copy.deepcopy(base).requires_grad_(True)), (ADAPTER, adapted)]
    try:
        steps = {name: _training(each, images) for name, each in trained}
        saved = {name: saved_bytes(partial(_loss, each, images), _tensors(each)) for name, each in trained}
        training = interleave({name: partial(seconds, step, where) for name, step in steps.items()}, rounds)
        looked = [(BASE, base), (UNMERGED, adapted.eval()), (MERGED, remove(merge(copy.deepcopy(adapted))))]
        looks = {name: partial(seconds, partial(_look, each, images), where) for name, each in looked}
        forward = interleave(looks, rounds)
    except RuntimeError as cause:
        first = str(cause).splitlines()[0]
        raise CommandError(
            f"{model} cannot take a batch {tuple(images.shape)} ({first}). Nothing was changed."
        ) from cause
    data = {
        "model": model,
        "batch": list(images.shape),
        "rounds": rounds,
        "training": _figures(training, FULL),
        "saved_bytes": saved,
        "inference": _figures(forward, BASE),
        "machine": _machine(where),
    }
    return Answer(data, _shown(data))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as cause:
        raise CommandError(f"--device {name}: {str(cause).splitlines()[0]}. Nothing was changed.") from cause
    return device


def _training(model: nn.Module, images: Tensor) -> Callable[[], None]:
    """Return a training step, after two steps have run: B is zero before the first."""
    model.train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(_loss(model, images))
        optimizer.step()

    step()
    step()
    return step


def _loss(model: nn.Module, images: Tensor) -> Tensor:
    """Return a scalar for the backward: the mean square of all the model's outputs."""
    leaves = pytree.tree_leaves(model(images))
    found = [leaf.float().square().mean() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not found:
        raise CommandError("The model's output for a batch of images holds no float tensor. Nothing was changed.")
    return torch.stack(found).sum()


def _look(model: nn.Module, images: Tensor) -> None:
    with torch.inference_mode():
        model(images)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _figures(times: Times, reference: str) -> dict[str, Any]:
    """Return quartiles of the seconds, and of the ratios to the reference in each round."""
    found: dict[str, Any] = {"reference": reference}
    for name, values in times.items():
        shares = Quartiles.of(ratios(values, times[reference]))
        found[name] = {"seconds": vars(Quartiles.of(values)), "ratio": vars(shares)}
    return found


def _machine(device: torch.device) -> dict[str, Any]:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    threads = torch.get_num_threads()
    return {"device": where, "cores": os.cpu_count(), "threads": threads, "torch": torch.__version__}


def _shown(data: dict[str, Any]) -> Sequence[Any]:
    training, inference, machine = data["training"], data["inference"], data["machine"]
    rows = [(*_row(name, training[name]), f"{data['saved_bytes'][name] / 1e6:,.1f} MB") for name in (FULL, ADAPTER)]
    looks = [_row(name, inference[name]) for name in (BASE, UNMERGED, MERGED)]
    return [
        table(("training step", "ratio", "quartiles", "ms", "kept for backward"), rows, "lrrrr"),
        "",
        table(("forward", "ratio", "quartiles", "ms"), looks, "lrrr"),
        "",
        f"{data['model']}, batch {'×'.join(map(str, data['batch']))}; medians of {data['rounds']} interleaved rounds; "
        f"{machine['device']}, {machine['cores']} cores, {machine['threads']} threads, torch {machine['torch']}",
    ]


def _row(name: str, figures: dict[str, Any]) -> tuple[str, str, str, str]:
    ratio = figures["ratio"]
    spread = f"{ratio['low']:.2f}–{ratio['high']:.2f}"
    return name, f"{ratio['median']:.2f}", spread, f"{1e3 * figures['seconds']['median']:.1f}"
