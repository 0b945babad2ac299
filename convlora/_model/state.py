"""The record of an injected model: its adapters, which of them are active, and what is needed to restore the base.

One :class:`Injection` is stored on the module that was given to ``inject``. It refers to modules as well as names, so
it follows deepcopy and pickle, and detects modules that the user has replaced since.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._layer.adapted import (
    CHILD,
    SHARDED,
    AdaptedLayer,
    base_weight,
    carries,
    change_of,
    held,
    layer_weight,
)
from .._layer.change import Change
from .._layer.gate import alone
from .._layer.masked import Masked, set_masked
from .._layer.places import BASE, COPY, MIXTURE, SWAPPING, Place
from .._layer.routing import Owner
from .._plan import NormPolicy, Plan
from ..errors import StateError
from .checks import check_is_module, check_model
from .mixing import Mixtures
from .norms import FrozenNorm, TrackedNorm, set_policy
from .targets import dotted, names_of

RECORD = "_convlora"


@dataclass
class Adapter:
    """The record of one adapter."""

    plan: Plan
    modules: dict[str, nn.Module]
    """Every module that the plan names."""
    layers: list[nn.Module]
    """Adapted layers, in the plan's order."""
    norms: dict[nn.Module, NormPolicy]
    """The norm policy of each norm layer while the adapter is active."""
    idle: list[nn.Module] = field(default_factory=list)
    """Layers where its factors are zero; a hot swap can overwrite them with another adapter's. See ``hotswap.py``."""
    activations: list[nn.Module] = field(default_factory=list)
    """Activations and pooling that keep a mask while the adapter is active."""
    frozen_factors: list[tuple[nn.Module, str]] = field(default_factory=list)
    """Factors whose training is off while the adapter is inactive, as (module, name)."""

    @property
    def changes(self) -> list[Change]:
        """The change of every layer, in the plan's order; StateError if a layer has lost its change."""
        if lost := self.lost():
            raise StateError(
                f"{', '.join(lost)}: the factors of adapter {self.plan.adapter_name!r} were deleted. Put them back, or "
                "build the base anew and load the adapter that you saved."
            )
        name = self.plan.adapter_name
        return [change for layer in self.layers if (change := change_of(layer, name)) is not None]

    def lost(self) -> list[str]:
        """Return the names of layers whose factors other code has deleted."""
        name, pairs = self.plan.adapter_name, zip(self.plan.layers, self.layers, strict=True)
        return [planned.name for planned, layer in pairs if change_of(layer, name) is None]

    def follow(self) -> None:
        """Copy the layers' scalings and strengths, which the user may have set by hand, into the plan."""
        found = [(float(change.scaling), change.strength) for change in self.changes]
        if found != [(planned.scaling, planned.strength) for planned in self.plan.layers]:
            now = zip(self.plan.layers, found, strict=True)
            layers = tuple(replace(p, scaling=scaling, strength=strength) for p, (scaling, strength) in now)
            self.plan = replace(self.plan, layers=layers)

    @property
    def all_changes(self) -> list[Change]:
        """The changes of the plan's layers and of the idle layers."""
        zeros = (change_of(layer, self.plan.adapter_name) for layer in self.idle)
        return [*self.changes, *(change for change in zeros if change is not None)]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of every layer's change, DoRA's magnitudes included."""
        for change in self.all_changes:
            yield from change.parameters()


@dataclass(frozen=True)
class Blend:
    """Several adapters that are active together."""

    weights: dict[str, float]
    """The weights by adapter name, in the model's order, so that the user's order changes no bit of the result."""
    owner: str | None
    """The adapter whose head, statistics and other modules are used; None for a mixture by weight."""
    trained: tuple[str, ...]
    """The adapters whose factors are trained."""

    @classmethod
    def of(cls, wanted: str | Blend) -> Blend:
        """Return the blend; one adapter's name becomes a blend of it alone."""
        return cls({wanted: 1.0}, wanted, (wanted,)) if isinstance(wanted, str) else wanted


@dataclass(frozen=True, eq=False)
class Scale:
    """The arguments of one open ``scaled`` block."""

    factor: float
    adapter_name: str | None
    """None for all that are active."""
    layers: frozenset[nn.Module] | None
    """None for all."""
    interpolate: bool
    """Whether head and statistics move, too."""

    def of(self, adapter_name: str, layer: nn.Module | None) -> float:
        """Return the factor of one adapter in a layer; with None, of its head and statistics."""
        concerned = self.adapter_name in (None, adapter_name)
        inside = self.interpolate if layer is None else self.layers is None or layer in self.layers
        return self.factor if concerned and inside else 1.0


@dataclass
class Injection:
    """The record of all that injection has changed in a model."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: str = ""
    """The active adapter; if several are, the owner of head and statistics, or else the first."""
    blend: Blend | None = None
    """The blend, if several adapters are active or one with a weight."""
    scales: dict[object, Scale] = field(default_factory=dict)
    """Open ``scaled`` blocks. A copy made inside blocks keeps theirs, under numbers, until ``set_adapter``."""
    disabled: bool = False
    """Whether adapters are disabled."""
    blocks: set[object] = field(default_factory=set)
    """Open ``disable_adapter`` blocks; a copy made inside one has none."""
    routed: set[object] = field(default_factory=set)
    """Open ``use_adapters`` blocks of all threads."""
    merged: bool = False
    """Whether the adapters are merged into the weights."""
    places: list[Place] = field(default_factory=list)
    frozen: list[tuple[nn.Module, str]] = field(default_factory=list)
    """The base's parameters that were trainable before, as (module, name)."""
    watched: set[bool] = field(default_factory=set)
    """Modes (``model.training``) in which a forward has been watched for writes; see ``written.py``."""
    remembered: list[tuple[nn.Module, str, nn.Parameter, Tensor]] = field(default_factory=list)
    """Base parameters, each with some of its numbers as they were."""

    @property
    def now(self) -> str | Blend:
        """What the model computes with unless adapters are disabled."""
        return self.blend or self.active

    @property
    def label(self) -> str | dict[str, float] | None:
        """The argument of ``set_adapter`` that gives this state; None while adapters are disabled."""
        return None if self.disabled else dict(self.blend.weights) if self.blend else self.active

    def policy(self, norm: nn.Module, blend: Blend, disabled: bool) -> NormPolicy | None:
        """Return a norm layer's policy under a blend: frozen if its statistics are a mixture or the base's."""
        names = (blend.owner,) if blend.owner else tuple(blend.weights)
        asked = {self.adapters[name].norms.get(norm) for name in names} - {None}
        is_mixed = blend.owner is None or self.scale(blend.owner, None) != 1
        return "freeze" if asked and (disabled or is_mixed) else next(iter(asked), None)

    @property
    def is_mixed(self) -> bool:
        """Whether a head, a bias or statistics in use are a mixture of several adapters'."""
        return any(place.owner == MIXTURE for place in self.places)

    @property
    def strengths(self) -> dict[str, dict[str, float]]:
        """The strengths other than 1, by adapter and layer."""
        found = {
            name: {p.name: c.strength for p, c in zip(each.plan.layers, each.changes, strict=True) if c.strength != 1}
            for name, each in self.adapters.items()
            if not each.lost()
        }
        return {name: strengths for name, strengths in found.items() if strengths}

    def scale(self, adapter_name: str, layer: nn.Module | None) -> float:
        """Return the product of the open ``scaled`` blocks' factors; see :meth:`Scale.of`."""
        return math.prod(scale.of(adapter_name, layer) for scale in self.scales.values())

    @property
    def trained(self) -> tuple[str, ...]:
        """The adapters whose factors are trained."""
        return self.blend.trained if self.blend else (self.active,)

    @property
    def layers(self) -> list[nn.Module]:
        """All layers that any adapter adapts."""
        adapters = self.adapters.values()
        return list(dict.fromkeys(layer for each in adapters for layer in (*each.layers, *each.idle)))

    @property
    def norms(self) -> list[nn.Module]:
        """All norm layers that any adapter freezes or tracks."""
        return list(dict.fromkeys(norm for each in self.adapters.values() for norm in each.norms))

    @property
    def activations(self) -> list[nn.Module]:
        """All activations and pooling that keep a mask for any adapter."""
        return list(dict.fromkeys(module for each in self.adapters.values() for module in each.activations))

    def mask(self) -> None:
        """Make exactly the active adapter's activations keep masks, or none while merged. May be run again."""
        adapter = self.adapters[self.active]
        active = set() if self.merged else set(adapter.activations)
        for module in self.activations:
            set_masked(module, adapter.plan.mask_activations if module in active else False)

    def __getstate__(self) -> dict[str, object]:
        return vars(self) | {"blocks": set(), "routed": set(), "scales": dict(enumerate(self.scales.values()))}

    @property
    def state(self) -> str:
        """The model's state as the table of a plan shows it."""
        return "merged" if self.merged else "injected"


def activate(root: nn.Module, injection: Injection, wanted: str | Blend, disabled: bool = False) -> None:
    """Make the model compute with these adapters, or with the base alone. May be run again after an interrupt.

    The adapter's other tensors are activated with it: the modules trained in full, norm statistics and norm policy.
    The factors of other adapters are not trainable meanwhile. With the base alone, its own statistics are used and its
    norm layers are frozen.
    """
    with SWAPPING, alone(root):
        _activate(root, injection, wanted, disabled)


def _activate(root: nn.Module, injection: Injection, wanted: str | Blend, disabled: bool) -> None:
    blend = Blend.of(wanted)
    copies: dict[int, Tensor] = {}
    mixtures = Mixtures(injection.places)
    for place in injection.places:
        weights = weights_in(place, injection, blend)
        if disabled:
            place.put_copy(copies)
        elif list(weights.values()) == [1.0]:
            place.put(*weights)
        else:
            place.kept[MIXTURE] = mixtures.of(place, weights)
            place.put(MIXTURE)
        for passing in (COPY, MIXTURE):
            if place.owner != passing:
                place.discard(passing)
    for layer in injection.layers:
        held(layer).activate(None if disabled else _owner_in(layer, injection, blend))
    holders = holders_of(root)
    for norm in injection.norms:
        set_policy(norm, injection.policy(norm, blend, disabled), holders.get(norm))
    for name, each in injection.adapters.items():
        _thaw_factors(each) if name in blend.trained else _freeze_factors(each)
    injection.active = blend.owner or next(iter(blend.weights))
    injection.blend, injection.disabled = None if isinstance(wanted, str) else blend, disabled
    injection.mask()


def _owner_in(layer: nn.Module, injection: Injection, blend: Blend) -> Owner:
    """Return what a layer computes with, the open ``scaled`` blocks included."""
    weights = {name: weight * injection.scale(name, layer) for name, weight in blend.weights.items()}
    return next(iter(weights)) if list(weights.values()) == [1.0] else tuple(weights.items())


def weights_in(place: Place, injection: Injection, blend: Blend) -> dict[str, float]:
    """Return the owners of a place's tensor and their weights, the open ``scaled`` blocks included."""
    asked = tuple((name, weight * injection.scale(name, place.module)) for name, weight in blend.weights.items())
    owners = {blend.owner: 1.0} if blend.owner else blend.weights
    return weights_of(place, asked, {name: weight * injection.scale(name, None) for name, weight in owners.items()})


def weights_of(place: Place, wanted: Owner, rest: Mapping[str, float] | None) -> dict[str, float]:
    """Return the owners of a place's tensor and their weights; a single weight of 1 means that owner's own tensor.

    Args:
        place: the place.
        wanted: an adapter, or several with their weights.
        rest: the weights for places other than biases that belong to a change; None for those of ``wanted``.
    """
    weights = {wanted: 1.0} if isinstance(wanted, str) else dict(wanted)
    if _is_of_change(place, weights):
        changes = ((name, weight, change_of(place.module, name)) for name, weight in weights.items())
        weights = {name: weight * change.strength for name, weight, change in changes if change}
        weights = {name: weight for name, weight in weights.items() if place.has(name)}
    elif rest is not None:
        weights = dict(rest)
    return weights if any(map(place.has, weights)) else {BASE: 1.0}


def _is_of_change(place: Place, names: Iterable[str]) -> bool:
    """Return whether it is a bias that is trained as part of a layer's change (SSF)."""
    is_bias = place.is_parameter and place.name == "bias"
    return is_bias and any(change_of(place.module, name) for name in names)


def untrained_biases(injection: Injection) -> list[Place]:
    """Return the biases of trained changes that are a mixture now and therefore not trained."""
    return [p for p in injection.places if p.owner == MIXTURE and _is_of_change(p, injection.trained)]


def mark(root: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """A hook of ``state_dict`` that writes the model's state into the metadata."""
    injection = vars(root).get(RECORD)
    if isinstance(injection, Injection):
        metadata[CHILD] = {
            "merged": injection.merged,
            "active": injection.label,
            "mixed": injection.is_mixed,
            "strengths": injection.strengths,
        }


def check_mark(root: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *_: Any) -> None:
    """A hook before ``load_state_dict`` that refuses a state dict of another state before anything is copied."""
    injection = vars(root).get(RECORD)
    if not isinstance(injection, Injection):
        return
    theirs = metadata.get(CHILD, {})
    is_injected = has_factors(state, prefix)
    if injection.merged and (is_injected or theirs.get("merged") is False):
        raise StateError(
            "The model is merged and the state dict is of an unmerged one, with the base's weights. Call "
            "convlora.unmerge(model), load, and merge again. Nothing was loaded."
        )
    weights = {} if injection.merged or is_injected or theirs else _base_weights(root, prefix)
    of_base = bool(weights) and weights.keys() <= state.keys()
    if not injection.merged and (theirs.get("merged") or (of_base and _is_merged(weights, state))):
        raise StateError(
            "The state dict is of a merged model, and its weights hold the adapter already, which would be added to "
            "them again. Load it into a plain network, or convlora.merge(model) first. Nothing was loaded."
        )
    if theirs and (theirs.get("mixed") or injection.is_mixed):
        which = "The state dict has" if theirs.get("mixed") else "The model has"
        raise StateError(
            f"{which} a head, statistics or biases that are a mixture of several adapters'. Before a state dict is "
            "taken or loaded, leave scaled blocks and activate one adapter, or several with an owner, with "
            "convlora.set_adapter; or use convlora.save_adapter. Nothing was loaded."
        )
    if theirs and (strengths := theirs.get("strengths", {})) != injection.strengths:
        raise StateError(
            f"The state dict was taken at the adapters' strengths {strengths or 1}, and the model has "
            f"{injection.strengths or 1}; a state dict does not hold them. Call convlora.set_scale first. Nothing was "
            "loaded."
        )
    active = injection.label
    if theirs and theirs["active"] != active:
        name = theirs["active"]
        remedy = f"convlora.set_adapter(model, {name!r})" if name else "convlora.disable_adapter(model)"
        raise StateError(
            f"The state dict has the head and statistics of {name or 'the base'!r}, and the model has those of "
            f"{active or 'the base'!r}. Call {remedy} first. Nothing was loaded."
        )
    if of_base:
        _give_base(root, injection, state, prefix)


def _base_weights(root: nn.Module, prefix: str) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    """Return the adapted layers that have a weight Parameter, with that Parameter, by state-dict key."""
    adapted = ((name, cast(nn.Module, m)) for name, m in root.named_modules() if isinstance(m, AdaptedLayer))
    named = ((prefix + dotted(name, "weight"), layer) for name, layer in adapted)
    return {key: (layer, base_weight(layer)) for key, layer in named if layer._parameters.get("weight") is not None}


def _is_merged(weights: dict[str, tuple[nn.Module, nn.Parameter]], state: dict[str, Any]) -> bool:
    """Return whether a state dict without metadata (of safetensors) holds W + ΔW of this model instead of W."""
    with torch.no_grad():
        for key, (layer, weight) in weights.items():
            theirs = state[key]
            if weight.is_meta or theirs.is_meta or weight.shape != theirs.shape or hasattr(weight, "device_mesh"):
                continue
            effective = layer_weight(layer)
            change = (effective - weight).float().norm()
            if change > 0:  # one layer is enough: no other checkpoint is as close to W + ΔW
                return bool((theirs.to(weight.device) - effective).float().norm() < 0.01 * change)
    return False


def _give_base(root: nn.Module, injection: Injection, state: dict[str, Any], prefix: str) -> None:
    """Load a base's checkpoint also into the base's tensors that are kept, and into an adapter's that equal them."""
    names = names_of(root)
    for place in injection.places:
        new = state.get(prefix + dotted(names.get(place.module, "?"), place.name))
        base = place.of(BASE)
        if not isinstance(new, Tensor) or base is None or base.shape != new.shape:
            continue
        same = [kept for owner, kept in place.kept.items() if owner == BASE or _equals(kept, base)]
        with torch.no_grad():
            for kept in cast("list[Tensor]", same):
                kept.copy_(new)


def _equals(kept: Tensor | None, base: Tensor) -> bool:
    return kept is not None and kept.shape == base.shape and torch.equal(kept.to(base.device, base.dtype), base)


def hook_state_dicts(root: nn.Module) -> None:
    """Register the hooks that mark and check state dicts. May be run again."""
    unhook_state_dicts(root)
    cast(Any, root)._register_state_dict_hook(mark)
    cast(Any, root).register_load_state_dict_pre_hook(check_mark)


def unhook_state_dicts(root: nn.Module) -> None:
    """Undo :func:`hook_state_dicts`; may be run again."""
    remove_hooks((root._state_dict_hooks, root._load_state_dict_pre_hooks), (mark, check_mark))


def remove_hooks(tables: Iterable[dict[int, Any]], functions: tuple[Callable[..., Any], ...]) -> None:
    """Remove these functions from tables of a module's hooks."""
    for hooks in tables:
        for key, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) in functions:
                hooks.pop(key, None)


def has_factors(state: Mapping[str, Any], prefix: str) -> bool:
    """Return whether a state dict holds adapters' factors below this prefix."""
    return any(f".{CHILD}." in f".{key[len(prefix) :]}" for key in state if key.startswith(prefix))


def holders_of(root: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return the parent of each module."""
    return {child: module for module in root.modules() for child in module.children()}


def _freeze_factors(each: Adapter) -> None:
    for change in each.all_changes:
        for name, factor in change.named_parameters():
            if factor.requires_grad:
                each.frozen_factors.append((change, name))
                factor.requires_grad_(False)


def _thaw_factors(each: Adapter) -> None:
    for change, name in each.frozen_factors:
        change.get_parameter(name).requires_grad_(True)
    each.frozen_factors.clear()


def injections(model: nn.Module) -> Iterator[tuple[str, nn.Module, Injection]]:
    """Yield (name, module, record) of every injected module: the model itself or modules inside it."""
    check_is_module(model)
    for name, module in model.named_modules():
        record = vars(module).get(RECORD)
        if isinstance(record, Injection) and record.adapters:
            yield name, module, record


def injected(model: nn.Module) -> list[tuple[str, nn.Module, Injection]]:
    """Return what :func:`injections` yields, at least one.

    Raises:
        StateError: there is none.
    """
    found = list(injections(model))
    if not found:
        if any(map(_is_ours, model.modules())):
            raise StateError(
                f"{type(model).__name__} is a part of an injected model, or a copy of a part, or made of its layers (a "
                "feature extractor, say), and only the whole model knows its adapters. Call this on the whole model; "
                "shared layers change with it. To get a plain copy of a part, copy it after "
                "convlora.remove(convlora.merge(model)). Nothing was changed."
            )
        raise StateError(
            f"{type(model).__name__} carries no adapter. Call convlora.inject(model) first; if you injected into "
            "a larger model, give that one."
        )
    return found


def the_injection(model: nn.Module) -> tuple[nn.Module, Injection]:
    """Return the only injected module in the model and its record.

    Raises:
        StateError: there is none, or there are several.
    """
    found = injected(model)
    if len(found) > 1:
        names = ", ".join(name or "the model" for name, _, _ in found)
        raise StateError(f"{type(model).__name__} holds several injected parts ({names}); give one of them.")
    return found[0][1], found[0][2]


InjectedPart = tuple[nn.Module, Injection]
"""An injected module and its record."""


def ready(model: nn.Module, *needs: Callable[[Injection], None]) -> list[InjectedPart]:
    """Return every injected part of the model, after running these checks (``check_…`` below) on each.

    Raises:
        StateError: there is none, or a check fails.
    """
    return checked([(root, injection) for _, root, injection in injected(model)], *needs)


def ready_alone(model: nn.Module, *needs: Callable[[Injection], None]) -> InjectedPart:
    """As :func:`ready`, for the only injected part.

    Raises:
        StateError: there is none, or there are several, or a check fails.
    """
    return checked([the_injection(model)], *needs)[0]


def checked(parts: list[InjectedPart], *needs: Callable[[Injection], None]) -> list[InjectedPart]:
    """Return the parts after running these checks on each."""
    for root, injection in parts:
        for check in needs:
            check(injection)
        check_intact(root, injection)
    return parts


def root_of(model: nn.Module) -> nn.Module:
    """Return the module to which another adapter is added: the injected one, or else the model, which must be plain."""
    check_model(model)
    if any(injections(model)):
        return the_injection(model)[0]
    check_plain(model)
    return model


def check_addable(root: nn.Module, adapter_name: str) -> None:
    """Raise StateError if an adapter of this name cannot be added to what :func:`root_of` returned."""
    injection = vars(root).get(RECORD)
    if isinstance(injection, Injection):
        checked([(root, injection)], check_unmerged)
        check_new(injection, adapter_name)


def check_new(injection: Injection, adapter_name: str) -> None:
    """Raise StateError if there is an adapter of this name."""
    if adapter_name in injection.adapters:
        raise StateError(
            f"There is an adapter {adapter_name!r} already. Give the new one another name (adapter_name=...), or load "
            "it into the plain model, which convlora.remove(model) gives. Nothing was changed."
        )


def the_adapter(injection: Injection, adapter_name: str | None) -> Adapter:
    """Return the adapter of this name, or the active one (None).

    Raises:
        StateError: there is none of this name; or several are active, and none was named.
    """
    if adapter_name is None and injection.blend:
        raise StateError(
            f"Adapters are active by weight, {injection.blend.weights}: give the name of one. "
            "convlora.combine_adapters makes one adapter of several, convlora.set_scale changes an adapter's strength. "
            "Nothing was changed."
        )
    found = injection.adapters.get(injection.active if adapter_name is None else adapter_name)
    if found is None:
        there = ", ".join(map(repr, injection.adapters))
        raise StateError(f"There is no adapter {adapter_name!r}; there is {there}.")
    return found


def check_plain(model: nn.Module) -> None:
    """Raise StateError if the model contains an injected module, or is a part of one."""
    for name, _, injection in injections(model):
        raise StateError(
            f"{name or type(model).__name__} carries the adapter {injection.active!r} already; call "
            "convlora.add_adapter for another beside it, or convlora.remove(model) first. Nothing was changed."
        )
    for name, module in model.named_modules():
        record = vars(module).get(RECORD)
        if isinstance(record, Injection) and not record.adapters:
            del vars(module)[RECORD]  # what was removed by a shallow copy of the module
        elif RECORD in vars(module):
            raise StateError(
                f"{name or type(model).__name__} has an attribute named {RECORD!r}, which convlora needs for itself; "
                "rename it. Nothing was changed."
            )
        if _is_ours(module):
            raise StateError(
                f"{name or type(model).__name__} belongs to a model that carries an adapter already; "
                "call convlora.remove on that model first. Nothing was changed."
            )


def _is_ours(module: nn.Module) -> bool:
    return isinstance(module, (AdaptedLayer, FrozenNorm, TrackedNorm, Masked)) or carries(module)


IN_SHARDS = (
    "{} is sharded over processes. Gather the state dict, load it into an injected model that is not sharded, and call "
    "again with that. Nothing was changed."
)


def check_whole(root: nn.Module) -> None:
    """Raise StateError if tensors are on the meta device or sharded over processes."""
    for name, tensor in (*root.named_parameters(), *root.named_buffers()):
        if tensor.is_meta:
            raise StateError(f"{name} is on the meta device and has no values. Nothing was changed.")
        if hasattr(tensor, "device_mesh") or hasattr(tensor, "_fsdp_flattened"):
            raise StateError(IN_SHARDS.format(name))
    for name, module in root.named_modules():
        if SHARDED in vars(module) and any(isinstance(value, Tensor) for value in vars(module).values()):
            raise StateError(IN_SHARDS.format(name))  # a view of FSDP's flat parameter, in a parameter's place


def check_intact(root: nn.Module, injection: Injection) -> None:
    """Raise StateError if tensors are not in this process, or a module was replaced after injection."""
    check_whole(root)
    replaced = replaced_modules(root, injection)
    if replaced:
        raise StateError(
            f"{', '.join(replaced)} of {type(root).__name__} was replaced after convlora.inject, and the adapter is "
            "still on the old module. For a new head, call convlora.adopt(model). For other modules, call "
            "convlora.remove(model), change the model, and inject again."
        )


def replaced_modules(root: nn.Module, injection: Injection) -> list[str]:
    """Return the names of modules that were replaced after injection."""
    # FSDP1 puts a wrapper under the module's name; the later of the two names is the module inside.
    now = {name.replace("._fsdp_wrapped_module", ""): m for name, m in root.named_modules(remove_duplicate=False)}
    concerned = {name: module for each in injection.adapters.values() for name, module in each.modules.items()}
    return [name or "the model" for name, module in concerned.items() if now.get(name) is not module]


def check_unmerged(injection: Injection) -> None:
    """Raise StateError while merged weights are in place."""
    if injection.merged:
        raise StateError("The adapter is merged; call convlora.unmerge(model) first. Nothing was changed.")


def check_outside_blocks(injection: Injection) -> None:
    """Raise StateError inside a ``disable_adapter`` block."""
    if injection.blocks:
        raise StateError("Adapters are disabled; leave the disable_adapter block first. Nothing was changed.")


def check_single(injection: Injection) -> None:
    """Raise StateError unless exactly one adapter is active, outside of ``scaled`` blocks."""
    if injection.blend or injection.scales:
        what = (
            f"Adapters are active by weight, {injection.blend.weights}" if injection.blend else "A scaled block is open"
        )
        raise StateError(
            f"{what}. Activate one adapter with convlora.set_adapter, outside of scaled blocks, first. Nothing was "
            "changed."
        )


def check_enabled(injection: Injection) -> None:
    """Raise StateError inside a ``disable_adapter`` block, and for a copy that was made inside one."""
    check_outside_blocks(injection)
    if injection.disabled:
        raise StateError(
            "Adapters are disabled: this copy was made inside a disable_adapter block. "
            f"convlora.set_adapter(model, {injection.active!r}) enables them. Nothing was changed."
        )


def check_unrouted(injection: Injection) -> None:
    """Raise StateError while a ``use_adapters`` block is open in any thread."""
    if injection.routed:
        raise StateError("A use_adapters block is open; leave every one of them first. Nothing was changed.")


def to_the_end(step: Callable[[], None]) -> None:
    """Run a repeatable step; after an interrupt run it again to the end, then raise the interrupt."""
    try:
        step()
    except BaseException:
        step()
        raise
