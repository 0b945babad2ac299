"""Test cases: a network, its smallest accepted input, and its preparation, so that every branch affects the output."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import keystr, tree_map_only, tree_map_with_path

BATCH = 2
QUIET = 1e-3
"""A parameter with no larger element than this (a zeroed last norm, a layer scale of 1e-6) would hide its branch."""


@dataclass(frozen=True)
class Sample:
    """A forward's inputs; ``train`` holds further inputs in train mode, such as a detector's targets."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)

    def double(self) -> Sample:
        """The sample in float64, except keypoints, which torchvision accepts only in float32."""
        whole = (self.args, self.kwargs, self.train)
        args, kwargs, train = tree_map_with_path(lambda path, leaf: _widened(leaf, keystr(path)), whole)
        return Sample(args, kwargs, train)

    def shapes(self) -> str:
        """The inputs' shapes, such as ``2×3×64×64``, separated by commas."""
        return ", ".join("×".join(map(str, tensor.shape)) for tensor in tensors_in((self.args, self.kwargs)))


@dataclass(frozen=True)
class Case:
    """A network under test.

    Attributes:
        name: ``family/network``.
        build: makes the network for an input size in pixels (frames, samples), which most networks ignore.
        sample: makes an input of a size.
        sizes: sizes to try, the smallest first.
    """

    name: str
    build: Callable[[int], nn.Module]
    sample: Callable[[int], Sample]
    sizes: tuple[int, ...] = (64, 96, 128, 160, 192, 224, 256, 320, 384)


@dataclass(frozen=True)
class Subject:
    """A case at an accepted size: its weights, an input, and any number of equal networks."""

    case: Case
    size: int
    sample: Sample
    state: dict[str, Tensor]

    def fresh(self) -> nn.Module:
        """A new network with the subject's weights; it is built again, since not every network can be copied."""
        with SkipInitialisation():
            model = _seeded_build(self.case, self.size)
        model.load_state_dict(self.state)
        return model


class SkipInitialisation(TorchFunctionMode):
    """Fills weights with zeros in place of random numbers, which take long, since the weights are loaded afterwards."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace in-place draws of random numbers by zeros."""
        if func in (Tensor.normal_, Tensor.uniform_, Tensor.erfinv_):
            return args[0].zero_()
        return func(*args, **(kwargs or {}))


def _widened(leaf: object, path: str) -> object:
    floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return leaf.double() if floating and "keypoints" not in path else leaf  # type: ignore[attr-defined]


def images(*channels: int) -> Callable[[int], Sample]:
    """Samples of ``(2, *channels, size, size)``; ``images(3, 4)`` has four frames."""
    return lambda size: Sample((noise(BATCH, *channels, size, size),))


def noise(*shape: int) -> Tensor:
    """Normal random numbers with a fixed seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def prepare(case: Case) -> Subject:
    """The case at the first size at which the plain network runs in both modes with finite outputs.

    Raises:
        RuntimeError: at no size; the cause is the last error.
    """
    cause: Exception | None = None
    for size in case.sizes:
        model = _seeded_build(case, size)
        _enliven(model)
        sample = case.sample(size)
        try:
            _calibrate(model, sample)
            found = evaluate(model, sample)
        except Exception as error:
            cause = error
            continue
        if found and all(not t.isnan().any() for t in found):
            return Subject(case, size, sample, model.state_dict())
        cause = RuntimeError(f"NaN or nothing in the output of the plain network at size {size}")
    raise RuntimeError(f"{case.name} runs at none of the sizes {case.sizes}: {cause!r}") from cause


def _seeded_build(case: Case, size: int) -> nn.Module:
    torch.manual_seed(0)
    return case.build(size)


def _enliven(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() and parameter.abs().max() < QUIET:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def _calibrate(model: nn.Module, sample: Sample) -> None:
    # The outputs of untrained networks explode in eval mode without running statistics, which one batch gives them.
    norms = [m for m in model.modules() if isinstance(m, _NormBase)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        run(model.train(), sample, training=True)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def run(model: nn.Module, sample: Sample, *, training: bool) -> list[Tensor]:
    """Run one forward with a fixed seed in the model's current mode; returns every tensor of the output."""
    torch.manual_seed(11)
    np.random.seed(11)  # SpecAugment of transformers draws there
    given = (sample.args, sample.kwargs | (sample.train if training else {}))
    args, kwargs = tree_map_only(Tensor, Tensor.clone, given)  # some networks (RCAN) write to their input
    return list(tensors_in(model(*args, **kwargs)))


def evaluate(model: nn.Module, sample: Sample) -> list[Tensor]:
    """The outputs in eval mode without gradients; the model's modes are restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        found = run(model, sample, training=False)
    for module, mode in modes:
        module.training = mode
    return found


def tensors_in(output: object) -> Iterator[Tensor]:
    """Every tensor in an output: nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from itertools.chain.from_iterable(map(tensors_in, output.values()))
    elif is_dataclass(output):
        yield from itertools.chain.from_iterable(map(tensors_in, vars(output).values()))
    elif isinstance(output, (list, tuple)):
        yield from itertools.chain.from_iterable(map(tensors_in, output))


def relative_error(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """max |a − b| / max |b| of the worst tensor; infinite if number or shapes differ."""
    left, right = list(found), list(expected)
    if [t.shape for t in left] != [t.shape for t in right]:
        return float("inf")
    return max((_error(a, b) for a, b in zip(left, right, strict=True) if a.numel()), default=0.0)


def _error(found: Tensor, expected: Tensor) -> float:
    if not expected.is_floating_point():
        found, expected = found.double(), expected.double()
    difference = (found - expected).abs()
    difference[found == expected] = 0.0  # equal infinities
    worst = difference.max().item()
    scale = expected[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 0.0
    return worst / scale if scale and worst == worst else (0.0 if worst == 0 else float("inf"))


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether the tensors are bit-equal, where zeros of both signs count as equal."""
    return len(found) == len(expected) and all(map(torch.equal, found, expected))
