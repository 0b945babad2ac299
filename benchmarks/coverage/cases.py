"""A network, inputs for it, and how to get it ready: the smallest input that it accepts, no branch silent."""

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
"""A parameter no larger than this anywhere (a zeroed last norm, a layer scale of 1e-6) would hide its branch."""


@dataclass(frozen=True)
class Sample:
    """What a forward takes; ``train`` holds what it takes besides in train mode, a detector's targets say."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)

    def double(self) -> Sample:
        """The same numbers in float64; keypoints stay as they are, torchvision takes them in float32 alone."""
        whole = (self.args, self.kwargs, self.train)
        args, kwargs, train = tree_map_with_path(lambda path, leaf: _widened(leaf, keystr(path)), whole)
        return Sample(args, kwargs, train)

    def shapes(self) -> str:
        """Such as ``2×3×64×64``; several inputs with commas."""
        return ", ".join("×".join(map(str, tensor.shape)) for tensor in tensors_in((self.args, self.kwargs)))


@dataclass(frozen=True)
class Case:
    """A network under test.

    Attributes:
        name: ``family/network``.
        build: makes it for an input size in pixels (frames, samples), which most ignore.
        sample: an input of a size.
        sizes: those to try, the smallest first.
    """

    name: str
    build: Callable[[int], nn.Module]
    sample: Callable[[int], Sample]
    sizes: tuple[int, ...] = (64, 96, 128, 160, 192, 224, 256, 320, 384)


@dataclass(frozen=True)
class Subject:
    """A case at the size that it accepts: weights, an input, and as many equal copies as wanted."""

    case: Case
    size: int
    sample: Sample
    state: dict[str, Tensor]

    def fresh(self) -> nn.Module:
        """A new network with the subject's weights; built anew, since not every network can be copied."""
        with SkipInitialisation():
            model = _seeded_build(self.case, self.size)
        model.load_state_dict(self.state)
        return model


class SkipInitialisation(TorchFunctionMode):
    """Zeros in place of random numbers in weights, which are loaded at once: truncated draws repeat until they fit."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The in-place draws fill with zeros, in a fraction of the time."""
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
    """The same normal numbers each time."""
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
    # Untrained networks explode in eval mode without statistics of their own; one batch gives them.
    norms = [m for m in model.modules() if isinstance(m, _NormBase)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        run(model.train(), sample, training=True)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def run(model: nn.Module, sample: Sample, *, training: bool) -> list[Tensor]:
    """One forward with a fixed seed in the mode that the model is in; every tensor of the output."""
    torch.manual_seed(11)
    np.random.seed(11)  # SpecAugment of transformers draws there
    given = (sample.args, sample.kwargs | (sample.train if training else {}))
    args, kwargs = tree_map_only(Tensor, Tensor.clone, given)  # some networks (RCAN) write to their input
    return list(tensors_in(model(*args, **kwargs)))


def evaluate(model: nn.Module, sample: Sample) -> list[Tensor]:
    """The outputs in eval mode, without gradients; the model's modes come back."""
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
    """max |a − b| / max |b| of the worst tensor; infinite where number or shapes differ."""
    left, right = list(found), list(expected)
    if [t.shape for t in left] != [t.shape for t in right]:
        return float("inf")
    return max((_error(a, b) for a, b in zip(left, right, strict=True) if a.numel()), default=0.0)


def _error(found: Tensor, expected: Tensor) -> float:
    if not expected.is_floating_point():
        found, expected = found.double(), expected.double()
    difference = (found - expected).abs()
    difference[found == expected] = 0.0  # infinities that agree
    worst = difference.max().item()
    scale = expected[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 0.0
    return worst / scale if scale and worst == worst else (0.0 if worst == 0 else float("inf"))


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Bit for bit, but that zeros of both signs are equal."""
    return len(found) == len(expected) and all(map(torch.equal, found, expected))
