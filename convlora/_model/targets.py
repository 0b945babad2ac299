"""Selects layers by type, glob, regular expression or predicate; the functions here do not change the model.

Selected layers are in the order of ``named_modules``.
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
    """Join the parts of a state-dict key; empty parts, such as the root's name, are left out.

    >>> dotted("layer1.0", "weight"), dotted("", "weight")
    ('layer1.0.weight', 'weight')
    """
    return ".".join(part for part in parts if part)


def is_convolution(module: nn.Module) -> bool:
    """Return whether this is a torch convolution of any dimension, also transposed, or a module with a kernel weight.

    The latter has an attribute ``kernel_size`` and a weight of at least three dimensions, such as torchvision's
    DeformConv2d and timm's CondConv2d.
    """
    return isinstance(module, _ConvNd) or (hasattr(module, "kernel_size") and len(weight_shape(module)) > 2)


def is_packed(module: nn.Module) -> bool:
    """Return whether this is a quantized layer of torch, whose ``weight`` is a method."""
    return callable(getattr(type(module), "weight", None))


def is_adaptable(module: nn.Module) -> bool:
    """Return whether this is a convolution or a linear layer."""
    return isinstance(module, nn.Linear) or is_convolution(module)


def is_counting(module: nn.Module) -> bool:
    """Return whether this is a convolution with the constant weight 0, 1, 2, … (detectors compute means with it)."""
    weight = module._parameters.get("weight")
    if weight is None or weight.is_meta or not is_convolution(module) or weight.dim() < 3:
        return False
    is_one = len(weight) == 1 and weight.numel() == weight.shape[1] > 2 and module._parameters.get("bias") is None
    return is_one and torch.equal(weight.detach().flatten(), torch.arange(weight.numel()).to(weight))


@dataclass(frozen=True)
class Named:
    """A module and its names in the model. A shared module has several names, of which the first is used."""

    names: tuple[str, ...]
    module: nn.Module

    @property
    def name(self) -> str:
        """The name in ``named_modules()``."""
        return self.names[0]


def modules_of(model: nn.Module) -> list[Named]:
    """Return each module of the base once, with all its names; the root's name is empty."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, (LayerAdapters, Change)):
            names.setdefault(module, []).append(name)
    return [Named(tuple(all_names), module) for module, all_names in names.items()]


def names_of(model: nn.Module) -> dict[nn.Module, str]:
    """Return the name of each module, as ``named_modules`` gives it."""
    return {module: name for name, module in model.named_modules()}


def as_targets(targets: Targets) -> tuple[Target, ...]:
    """Return one or several targets as a tuple."""
    if targets is None:
        return ()
    if isinstance(targets, (str, re.Pattern, type)) or not isinstance(targets, Iterable):
        return (targets,)
    return tuple(targets)


def matches(target: Target, candidate: Named) -> bool:
    """Return whether a target names this module, by any of its names."""
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
            f"The predicate failed at {name} ({type(module).__name__}): {cause!r}. It is called for linear layers as "
            "well as for convolutions: begin with isinstance(module, nn.Conv2d). Nothing was changed."
        ) from cause


def select(
    candidates: list[Named],
    targets: Targets,
    argument: str,
    model: nn.Module,
    suggest: Callable[[], list[Named]] = list,
) -> list[Named]:
    """Return the candidates that any target names; each target must name at least one.

    Args:
        candidates: the modules to choose from.
        targets: the user's targets.
        argument: the name of the argument that holds the targets, for errors.
        model: the model, for errors.
        suggest: returns modules that a target without a match may mean; default none.

    Raises:
        TargetError: targets match nothing; one error names all of them, each with the nearest names.
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
    """Return a note for each target that names one module and is the end of others' names, all of which peft adapts."""
    chosen = {c.module for c in found}
    others = Counter(ending for c in candidates if c.module not in chosen for ending in _endings(c))
    return [
        f"{argument}={target!r} names one layer; add '*.{target}' for {others[target]} more whose names end in it"
        for target in as_targets(targets)
        if _is_name(target) and others[target]
    ]


def _endings(candidate: Named) -> set[str]:
    """Return the ends of a module's names after each dot: for ``layer1.0.conv1``, ``0.conv1`` and ``conv1``."""
    return {name[dot + 1 :] for name in candidate.names for dot, letter in enumerate(name) if letter == "."}


def _is_name(target: Target) -> TypeGuard[str]:
    """Return whether a target is a string without wildcards, so that it can be looked up."""
    return isinstance(target, str) and not _WILD.search(target)


_WILD = re.compile(r"[*?[]")


class ByPattern(Generic[T]):
    """Values by pattern; the first pattern that names a module gives its value."""

    def __init__(self, values: Mapping[str | re.Pattern[str], T]) -> None:
        numbered = [(at, pattern, value) for at, (pattern, value) in enumerate(values.items())]
        self.patterns = tuple(values)
        self._named = {pattern: (at, value) for at, pattern, value in numbered if _is_name(pattern)}
        self._others = [each for each in numbered if not _is_name(each[1])]

    def of(self, candidate: Named, default: T) -> T:
        """Return the module's value; ``default`` if no pattern names it."""
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
        return f"{line} For the {inside} modules inside {pattern!r} write {pattern + '.*'!r}."
    if _is_name(target) and (ending := sum(target in _endings(c) for c in candidates)):
        return f"{line} A name must be complete; for all that end in {pattern!r} ({ending}) write '*.{pattern}'."
    if isinstance(target, str) and set(pattern) & set("\\()|^$+"):
        line += " A string is a glob; for a regular expression give re.compile(...)."
    line += f" The head is {', '.join(map(repr, suggested))}." if suggested else ""
    near = difflib.get_close_matches(pattern, [c.name for c in candidates], n=4, cutoff=0.6 if suggested else 0.0)
    return f"{line} Closest names: {', '.join(near)}." if near else line


def exactly(names: Iterable[str]) -> Targets:
    """Return a target that names exactly these modules."""
    wanted = set(names)
    return (lambda name, _: name in wanted) if wanted else None
