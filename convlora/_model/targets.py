"""Which layers to adapt.

A target is named by type, glob, regular expression or predicate. Everything here reads the model and changes
nothing; ``inject.py`` carries out what is decided. Order of the result is ``named_modules`` order.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeGuard, TypeVar

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from .._layer.adapted import LayerAdapters
from .._layer.change import Change
from .._layer.computed import weight_shape
from ..errors import TargetError

Target = str | re.Pattern[str] | type[nn.Module] | Callable[[str, nn.Module], bool]
Targets = Target | Iterable[Target] | None
T = TypeVar("T")


def dotted(*parts: str) -> str:
    """A key of its parts; the root's name is empty.

    >>> dotted("layer1.0", "weight"), dotted("", "weight")
    ('layer1.0.weight', 'weight')
    """
    return ".".join(part for part in parts if part)


def is_convolution(module: nn.Module) -> bool:
    """A torch convolution of any dimension, transposed too, or a module that keeps kernels of its own.

    The latter is told by its ``kernel_size`` and a weight of kernels: torchvision's DeformConv2d, timm's CondConv2d.
    """
    return isinstance(module, _ConvNd) or (hasattr(module, "kernel_size") and len(weight_shape(module)) > 2)


def is_packed(module: nn.Module) -> bool:
    """A quantized layer of torch's, whose weight is a method."""
    return callable(getattr(type(module), "weight", None))


def is_adaptable(module: nn.Module) -> bool:
    """A convolution or a linear layer."""
    return isinstance(module, nn.Linear) or is_convolution(module)


def is_counting(module: nn.Module) -> bool:
    """A constant that detectors take an expectation with: a convolution to one channel that holds 0, 1, 2, …"""
    weight = module._parameters.get("weight")
    if weight is None or weight.is_meta or not is_convolution(module) or weight.dim() < 3:
        return False
    is_one = len(weight) == 1 and weight.numel() == weight.shape[1] > 2 and module._parameters.get("bias") is None
    return is_one and torch.equal(weight.detach().flatten(), torch.arange(weight.numel()).to(weight))


@dataclass(frozen=True)
class Named:
    """A module and every name that it has in the model; a shared module has several, and the first one counts."""

    names: tuple[str, ...]
    module: nn.Module

    @property
    def name(self) -> str:
        """The name that ``named_modules()`` gives."""
        return self.names[0]


def modules_of(model: nn.Module) -> list[Named]:
    """Each module of the base once, with all its names; the root's is empty."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, (LayerAdapters, Change)):
            names.setdefault(module, []).append(name)
    return [Named(tuple(all_names), module) for module, all_names in names.items()]


def as_targets(targets: Targets) -> tuple[Target, ...]:
    """One target or several, as a tuple."""
    if targets is None:
        return ()
    if isinstance(targets, (str, re.Pattern, type)) or not isinstance(targets, Iterable):
        return (targets,)
    return tuple(targets)


def matches(target: Target, candidate: Named) -> bool:
    """Whether one target names this module; any of a shared module's names will do."""
    if isinstance(target, type):
        return isinstance(candidate.module, target)
    if isinstance(target, str):
        return any(fnmatch.fnmatchcase(name, target) for name in candidate.names)
    if isinstance(target, re.Pattern):
        return any(target.fullmatch(name) for name in candidate.names)
    if callable(target) and not isinstance(target, nn.Module):
        return any(_ask(target, name, candidate.module) for name in candidate.names)
    raise TargetError(
        f"{target!r} is not a valid target; give a type such as nn.Conv2d, a glob such as 'layer4.*', a compiled "
        "regular expression, or a function (name, module) -> bool."
    )


def _ask(predicate: Callable[[str, nn.Module], bool], name: str, module: nn.Module) -> bool:
    try:
        return bool(predicate(name, module))
    except Exception as cause:
        raise TargetError(
            f"The predicate failed at {name} ({type(module).__name__}): {cause!r}. It is asked for linear layers as "
            "well as for convolutions: begin with isinstance(module, nn.Conv2d). Nothing was changed."
        ) from cause


def select(
    candidates: list[Named],
    targets: Targets,
    argument: str,
    model: nn.Module,
    suggest: Callable[[], list[Named]] = list,
) -> list[Named]:
    """The candidates that any target names; each target must name at least one.

    Args:
        candidates: the modules to choose from.
        targets: the user's targets.
        argument: the argument that they were given as, for errors.
        model: the model, for errors.
        suggest: what a target that matches nothing may have meant; default the nearest names.

    Raises:
        TargetError: all targets that match nothing, in one error, each with the nearest names there are.
    """
    wanted = as_targets(targets)
    names = {name for c in candidates for name in c.names}
    plain = {target for target in wanted if _is_name(target)}
    others = [target for target in wanted if not _is_name(target)]
    missed = [t for t in wanted if not (t in names if _is_name(t) else any(matches(t, c) for c in candidates))]
    if missed:
        raise TargetError(_missed(missed, candidates, argument, model, suggest))
    return [c for c in candidates if not plain.isdisjoint(c.names) or any(matches(target, c) for target in others)]


def narrow_names(candidates: list[Named], targets: Targets, argument: str, found: list[Named]) -> list[str]:
    """A note for each name that is one module's, where other modules end in it: users of peft mean all of those."""
    chosen = {c.module for c in found}
    others = Counter(ending for c in candidates if c.module not in chosen for ending in _endings(c))
    return [
        f"{argument}={target!r} is the layer of this name alone; "
        f"add '*.{target}' for {others[target]} more that end in it"
        for target in as_targets(targets)
        if _is_name(target) and others[target]
    ]


def _endings(candidate: Named) -> set[str]:
    """What follows each dot of its names: for ``layer1.0.conv1`` ``0.conv1`` and ``conv1``."""
    return {name[dot + 1 :] for name in candidate.names for dot, letter in enumerate(name) if letter == "."}


def _is_name(target: Target) -> TypeGuard[str]:
    """Whether it can be looked up: a glob without a wildcard."""
    return isinstance(target, str) and not _WILD.search(target)


_WILD = re.compile(r"[*?[]")


class ByPattern(Generic[T]):
    """Values by pattern: a module has that of the first pattern that names it."""

    def __init__(self, values: Mapping[str | re.Pattern[str], T]) -> None:
        numbered = [(at, pattern, value) for at, (pattern, value) in enumerate(values.items())]
        self.patterns = tuple(values)
        self._named = {pattern: (at, value) for at, pattern, value in numbered if _is_name(pattern)}
        self._others = [each for each in numbered if not _is_name(each[1])]

    def of(self, candidate: Named, default: T) -> T:
        """The module's value; ``default`` where no pattern names it."""
        found = [self._named[name] for name in candidate.names if name in self._named]
        found += next(([(at, value)] for at, pattern, value in self._others if matches(pattern, candidate)), [])
        return min(found, key=lambda each: each[0])[1] if found else default


def _missed(
    missed: list[Target],
    candidates: list[Named],
    argument: str,
    model: nn.Module,
    suggest: Callable[[], list[Named]],
) -> str:
    suggested = [c.name for c in suggest()]
    lines = [_missed_one(target, candidates, argument, model, suggested) for target in missed]
    return "\n".join([*lines, "`print(convlora.plan(model))` lists every layer. Nothing was changed."])


def _missed_one(target: Target, candidates: list[Named], argument: str, model: nn.Module, suggested: list[str]) -> str:
    pattern = target.pattern if isinstance(target, re.Pattern) else target
    kind = type(model).__name__
    if not isinstance(pattern, str):
        return f"{argument}={getattr(pattern, '__name__', pattern)} matches no layer of {kind}."
    what = "module with parameters" if argument == "modules_to_save" else "layer that could be adapted"
    line = f"{argument}={pattern!r} matches no {what} of {kind}."
    inside = sum(c.name.startswith(pattern + ".") for c in candidates)
    if inside:
        return f"{line} For what is inside {pattern!r} ({inside}) write {pattern + '.*'!r}."
    if _is_name(target) and (ending := sum(target in _endings(c) for c in candidates)):
        return f"{line} A name is a whole one; for all that end in {pattern!r} ({ending}) write '*.{pattern}'."
    if isinstance(target, str) and set(pattern) & set("\\()|^$+"):
        line += " A string is a glob; for a regular expression give re.compile(...)."
    line += f" The head is {', '.join(map(repr, suggested))}." if suggested else ""
    near = difflib.get_close_matches(pattern, [c.name for c in candidates], n=4, cutoff=0.6 if suggested else 0.0)
    return f"{line} Closest names: {', '.join(near)}." if near else line


def exactly(names: Iterable[str]) -> Targets:
    """A target that names these modules and no other."""
    wanted = set(names)
    return (lambda name, _: name in wanted) if wanted else None
