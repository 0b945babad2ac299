"""What an injected model remembers: its adapters, which of them is active, and how all can be taken back.

One :class:`Injection` is kept on the module that was given to ``inject``. It refers to modules, not only to names, so
that it follows deepcopy and pickle, and can tell where the user has replaced a part since.
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
from .checks import check_model
from .mixing import Mixtures
from .norms import FrozenNorm, TrackedNorm, set_policy
from .targets import dotted

RECORD = "_convlora"


@dataclass
class Adapter:
    """One adapter of a model."""

    plan: Plan
    modules: dict[str, nn.Module]
    """Every module that the plan names."""
    layers: list[nn.Module]
    """Adapted layers, in the plan's order."""
    norms: dict[nn.Module, NormPolicy]
    """What its norm layers do while it is active."""
    idle: list[nn.Module] = field(default_factory=list)
    """Layers for which it has zeros, so that another adapter's numbers can take their place; see ``hotswap.py``."""
    activations: list[nn.Module] = field(default_factory=list)
    """Those that keep a mask while it is active."""
    frozen_factors: list[tuple[nn.Module, str]] = field(default_factory=list)
    """Factors that were trainable when the adapter was last active, and are again when it is, as (module, name)."""

    @property
    def changes(self) -> list[Change]:
        """What every layer has of it, in the plan's order; StateError names those without."""
        if lost := self.lost():
            raise StateError(
                f"{', '.join(lost)}: the factors of adapter {self.plan.adapter_name!r} were deleted. Put them back, or "
                "build the base anew and load the adapter that you saved."
            )
        name = self.plan.adapter_name
        return [change for layer in self.layers if (change := change_of(layer, name)) is not None]

    def lost(self) -> list[str]:
        """Layers whose factors were deleted by other code."""
        name, pairs = self.plan.adapter_name, zip(self.plan.layers, self.layers, strict=True)
        return [planned.name for planned, layer in pairs if change_of(layer, name) is None]

    def follow(self) -> None:
        """Take the layers' scalings and strengths into the plan, also those written by hand: they are computed with."""
        found = [(float(change.scaling), change.strength) for change in self.changes]
        if found != [(planned.scaling, planned.strength) for planned in self.plan.layers]:
            now = zip(self.plan.layers, found, strict=True)
            layers = tuple(replace(p, scaling=scaling, strength=strength) for p, (scaling, strength) in now)
            self.plan = replace(self.plan, layers=layers)

    @property
    def all_changes(self) -> list[Change]:
        """Those of the plan's layers, and the zeros."""
        zeros = (change_of(layer, self.plan.adapter_name) for layer in self.idle)
        return [*self.changes, *(change for change in zeros if change is not None)]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained tensors of every layer's change, with DoRA the magnitudes among them."""
        for change in self.all_changes:
            yield from change.parameters()


@dataclass(frozen=True)
class Blend:
    """Several adapters that a model computes with at once."""

    weights: dict[str, float]
    """By name, in the order in which the model has them, so that no bit depends on the order of the asking."""
    owner: str | None
    """Whose head, statistics and other modules are in place; None: a mixture by weight."""
    trained: tuple[str, ...]
    """Whose factors are trained."""

    @classmethod
    def of(cls, wanted: str | Blend) -> Blend:
        """One adapter by itself as a blend."""
        return cls({wanted: 1.0}, wanted, (wanted,)) if isinstance(wanted, str) else wanted


@dataclass(frozen=True, eq=False)
class Scale:
    """What one open ``scaled`` block asks for."""

    factor: float
    adapter_name: str | None
    """None for all that are active."""
    layers: frozenset[nn.Module] | None
    """None for all."""
    interpolate: bool
    """Whether head and statistics move, too."""

    def of(self, adapter_name: str, layer: nn.Module | None) -> float:
        """The factor for one adapter in a layer; without a layer, for all else that it has."""
        concerned = self.adapter_name in (None, adapter_name)
        inside = self.interpolate if layer is None else self.layers is None or layer in self.layers
        return self.factor if concerned and inside else 1.0


@dataclass
class Injection:
    """What was done to a model."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: str = ""
    """The adapter that the model computes with; of several at once, the first or the owner of head and statistics."""
    blend: Blend | None = None
    """Several at once."""
    scales: dict[object, Scale] = field(default_factory=dict)
    """``scaled`` blocks that are open. In a copy that was made inside some, theirs by number, until ``set_adapter``."""
    disabled: bool = False
    """Whether the base computes alone for now."""
    blocks: set[object] = field(default_factory=set)
    """``disable_adapter`` blocks that are open; a copy that is made inside one has none to leave."""
    routed: set[object] = field(default_factory=set)
    """``use_adapters`` blocks that are open, in any thread."""
    merged: bool = False
    """Whether merged weights are in the base's place."""
    places: list[Place] = field(default_factory=list)
    frozen: list[tuple[nn.Module, str]] = field(default_factory=list)
    """Base parameters that were trainable, as (module, name)."""

    @property
    def now(self) -> str | Blend:
        """What the model computes with while adapters are not disabled."""
        return self.blend or self.active

    @property
    def label(self) -> str | dict[str, float] | None:
        """What ``set_adapter`` would be told to have it so; None while adapters are disabled."""
        return None if self.disabled else dict(self.blend.weights) if self.blend else self.active

    def policy(self, norm: nn.Module, blend: Blend, disabled: bool) -> NormPolicy | None:
        """What a norm layer does with a blend; with a mixture of statistics, and with the base's, it is frozen."""
        names = (blend.owner,) if blend.owner else tuple(blend.weights)
        asked = {self.adapters[name].norms.get(norm) for name in names} - {None}
        is_mixed = blend.owner is None or self.scale(blend.owner, None) != 1
        return "freeze" if asked and (disabled or is_mixed) else next(iter(asked), None)

    @property
    def is_mixed(self) -> bool:
        """Whether a head, a bias or statistics are in place that are no adapter's own."""
        return any(place.owner == MIXTURE for place in self.places)

    @property
    def strengths(self) -> dict[str, dict[str, float]]:
        """The layers' strengths by adapter, where they are not 1."""
        found = {
            name: {p.name: c.strength for p, c in zip(each.plan.layers, each.changes, strict=True) if c.strength != 1}
            for name, each in self.adapters.items()
            if not each.lost()
        }
        return {name: strengths for name, strengths in found.items() if strengths}

    def scale(self, adapter_name: str, layer: nn.Module | None) -> float:
        """The product of what open ``scaled`` blocks ask for; see :meth:`Scale.of`."""
        return math.prod(scale.of(adapter_name, layer) for scale in self.scales.values())

    @property
    def trained(self) -> tuple[str, ...]:
        """The adapters whose factors are trained."""
        return self.blend.trained if self.blend else (self.active,)

    @property
    def layers(self) -> list[nn.Module]:
        """Every layer that any adapter adapts."""
        adapters = self.adapters.values()
        return list(dict.fromkeys(layer for each in adapters for layer in (*each.layers, *each.idle)))

    @property
    def norms(self) -> list[nn.Module]:
        """Every norm layer that any adapter freezes or tracks."""
        return list(dict.fromkeys(norm for each in self.adapters.values() for norm in each.norms))

    @property
    def activations(self) -> list[nn.Module]:
        """Every activation that keeps a mask for any adapter."""
        return list(dict.fromkeys(module for each in self.adapters.values() for module in each.activations))

    def mask(self) -> None:
        """Let the active adapter's activations keep masks, while it is not merged, and no others; may be run again."""
        adapter = self.adapters[self.active]
        active = set() if self.merged else set(adapter.activations)
        for module in self.activations:
            set_masked(module, adapter.plan.mask_activations if module in active else False)

    def __getstate__(self) -> dict[str, object]:
        return vars(self) | {"blocks": set(), "routed": set(), "scales": dict(enumerate(self.scales.values()))}

    @property
    def state(self) -> str:
        """How a plan's table names the state of the model."""
        return "merged" if self.merged else "injected"


def activate(root: nn.Module, injection: Injection, wanted: str | Blend, disabled: bool = False) -> None:
    """Let the model compute with these adapters, or for now with the base alone; may be run again after an interrupt.

    What belongs to the adapter comes with it: the modules it trained in full, its norm statistics and policy.
    Factors of the others are not trainable meanwhile. The base alone is the base with its own statistics: its norm
    layers are frozen.
    """
    with SWAPPING, alone(root):
        _activate(root, injection, wanted, disabled)


def _activate(root: nn.Module, injection: Injection, wanted: str | Blend, disabled: bool) -> None:
    blend = Blend.of(wanted)
    copies: dict[int, Tensor] = {}
    mixtures = Mixtures(injection.places)
    for place in injection.places:
        weights = _weights_in(place, injection, blend)
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
    """What a layer computes with, ``scaled`` blocks considered."""
    weights = {name: weight * injection.scale(name, layer) for name, weight in blend.weights.items()}
    return next(iter(weights)) if list(weights.values()) == [1.0] else tuple(weights.items())


def _weights_in(place: Place, injection: Injection, blend: Blend) -> dict[str, float]:
    """Whose tensors a place has, and in which mixture, open ``scaled`` blocks considered."""
    asked = tuple((name, weight * injection.scale(name, place.module)) for name, weight in blend.weights.items())
    owners = {blend.owner: 1.0} if blend.owner else blend.weights
    return weights_of(place, asked, {name: weight * injection.scale(name, None) for name, weight in owners.items()})


def weights_of(place: Place, wanted: Owner, rest: Mapping[str, float] | None) -> dict[str, float]:
    """Whose tensors a place has for those wanted, each with its weight; one with weight 1 where it is that one's own.

    Args:
        place: in a module.
        wanted: an adapter, or several with their weights.
        rest: weights for all else than biases that are a part of a change, where they are others.
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
    """Whether it is a bias that is trained as a part of how a layer changes."""
    is_bias = place.is_parameter and place.name == "bias"
    return is_bias and any(change_of(place.module, name) for name in names)


def untrained_biases(injection: Injection) -> list[Place]:
    """Biases of changes that are trained at weight 1, and now are a mixture, which is not."""
    return [p for p in injection.places if p.owner == MIXTURE and _is_of_change(p, injection.trained)]


def mark(root: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """A hook of ``state_dict``: say in its metadata which state of the model it is of."""
    injection = vars(root).get(RECORD)
    if isinstance(injection, Injection):
        metadata[CHILD] = {
            "merged": injection.merged,
            "active": injection.label,
            "mixed": injection.is_mixed,
            "strengths": injection.strengths,
        }


def check_mark(root: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *_: Any) -> None:
    """A hook before ``load_state_dict``: refuse a state dict of another state, before a number is copied."""
    injection = vars(root).get(RECORD)
    if not isinstance(injection, Injection):
        return
    theirs = metadata.get(CHILD, {})
    has_factors = any(f".{CHILD}." in f".{key[len(prefix) :]}" for key in state if key.startswith(prefix))
    if injection.merged and (has_factors or theirs.get("merged") is False):
        raise StateError(
            "The model is merged and the state dict is of an unmerged one, with the base's weights. Call "
            "convlora.unmerge(model), load, and merge again. Nothing was loaded."
        )
    weights = {} if injection.merged or has_factors or theirs else _base_weights(root, prefix)
    of_base = bool(weights) and weights.keys() <= state.keys()
    if not injection.merged and (theirs.get("merged") or (of_base and _is_merged(weights, state))):
        raise StateError(
            "The state dict is of a merged model, and its weights hold the adapter already, which would be added to "
            "them again. Load it into a plain network, or convlora.merge(model) first. Nothing was loaded."
        )
    if theirs and (theirs.get("mixed") or injection.is_mixed):
        which = "The state dict has" if theirs.get("mixed") else "The model has"
        raise StateError(
            f"{which} a head, statistics or biases in place that are a mixture by weight, and no adapter's own. Leave "
            "scaled blocks, and convlora.set_adapter one adapter, or several with an owner, before a state dict is "
            "taken or loaded; or use convlora.save_adapter. Nothing was loaded."
        )
    if theirs and (strengths := theirs.get("strengths", {})) != injection.strengths:
        raise StateError(
            f"The state dict is of adapters at the strengths {strengths or 1}, and the model's have "
            f"{injection.strengths or 1}; a state dict does not hold them. Call convlora.set_scale first. Nothing was "
            "loaded."
        )
    active = injection.label
    if theirs and theirs["active"] != active:
        name = theirs["active"]
        remedy = f"convlora.set_adapter(model, {name!r})" if name else "convlora.disable_adapter(model)"
        raise StateError(
            f"The state dict has the head and statistics of {name or 'the base'!r}, and the model has those of "
            f"{active or 'the base'!r} in place. Call {remedy} first. Nothing was loaded."
        )
    if of_base:
        _give_base(root, injection, state, prefix)


def _base_weights(root: nn.Module, prefix: str) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    """The adapted layers that have a weight Parameter, and it, by state-dict key."""
    adapted = ((name, cast(nn.Module, m)) for name, m in root.named_modules() if isinstance(m, AdaptedLayer))
    named = ((prefix + dotted(name, "weight"), layer) for name, layer in adapted)
    return {key: (layer, base_weight(layer)) for key, layer in named if layer._parameters.get("weight") is not None}


def _is_merged(weights: dict[str, tuple[nn.Module, nn.Parameter]], state: dict[str, Any]) -> bool:
    """Whether a state dict without metadata (of safetensors) has W + ΔW of this model where the base has W."""
    with torch.no_grad():
        for key, (layer, weight) in weights.items():
            theirs = state[key]
            if weight.is_meta or theirs.is_meta or weight.shape != theirs.shape or hasattr(weight, "device_mesh"):
                continue
            effective = layer_weight(layer)
            change = (effective - weight).float().norm()
            if change > 0:  # one layer tells: no other checkpoint is as near
                return bool((theirs.to(weight.device) - effective).float().norm() < 0.01 * change)
    return False


def _give_base(root: nn.Module, injection: Injection, state: dict[str, Any], prefix: str) -> None:
    """Load a base's checkpoint into the tensors that are kept for the base, too, and where an adapter has the same."""
    names = {module: name for name, module in root.named_modules()}
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
    """Let the root's state dicts say which state they are of, and loading ask; may be run again."""
    unhook_state_dicts(root)
    cast(Any, root)._register_state_dict_hook(mark)
    cast(Any, root).register_load_state_dict_pre_hook(check_mark)


def unhook_state_dicts(root: nn.Module) -> None:
    """Undo :func:`hook_state_dicts`; may be run again."""
    for hooks in (root._state_dict_hooks, root._load_state_dict_pre_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) in (mark, check_mark):
                hooks.pop(key, None)


def holders_of(root: nn.Module) -> dict[nn.Module, nn.Module]:
    """The module that holds each module."""
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
    """Every injected module in the model, with its name: the model itself, or parts, or what a wrapper holds."""
    for name, module in model.named_modules():
        record = vars(module).get(RECORD)
        if isinstance(record, Injection) and record.adapters:
            yield name, module, record


def injected(model: nn.Module) -> list[tuple[str, nn.Module, Injection]]:
    """As :func:`injections`, at least one.

    Raises:
        StateError: there is none.
    """
    found = list(injections(model))
    if not found:
        if any(map(_is_ours, model.modules())):
            raise StateError(
                f"{type(model).__name__} is a part of an injected model, or a copy of a part, or made of its layers (a "
                "feature extractor, say): the whole model alone knows its adapters. Call this on the whole model. "
                "Layers that the two share change with it; a copy is to be taken afterwards, from "
                "convlora.remove(convlora.merge(model)). Nothing was changed."
            )
        raise StateError(
            f"{type(model).__name__} carries no adapter. Call convlora.inject(model) first; if you injected into "
            "a larger model, give that one."
        )
    return found


def the_injection(model: nn.Module) -> tuple[nn.Module, Injection]:
    """The one injected module in the model and its record.

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
    """Every injected part of the model, once each meets these needs (``check_…`` below) and is intact.

    Raises:
        StateError: there is none, or one does not.
    """
    return checked([(root, injection) for _, root, injection in injected(model)], *needs)


def ready_alone(model: nn.Module, *needs: Callable[[Injection], None]) -> InjectedPart:
    """As :func:`ready`, the one injected part.

    Raises:
        StateError: there is none, or there are several, or it does not meet the needs.
    """
    return checked([the_injection(model)], *needs)[0]


def checked(parts: list[InjectedPart], *needs: Callable[[Injection], None]) -> list[InjectedPart]:
    """The parts themselves, once each meets these needs and is intact."""
    for root, injection in parts:
        for check in needs:
            check(injection)
        check_intact(root, injection)
    return parts


def root_of(model: nn.Module) -> nn.Module:
    """Where another adapter goes: the module that carries some already, or else the model, which then must be plain."""
    check_model(model)
    if any(injections(model)):
        return the_injection(model)[0]
    check_plain(model)
    return model


def check_addable(root: nn.Module, adapter_name: str) -> None:
    """Raise StateError where an adapter of this name cannot be put on what :func:`root_of` gave."""
    injection = vars(root).get(RECORD)
    if isinstance(injection, Injection):
        checked([(root, injection)], check_unmerged)
        check_new(injection, adapter_name)


def check_new(injection: Injection, adapter_name: str) -> None:
    """Raise StateError where there is an adapter of this name."""
    if adapter_name in injection.adapters:
        raise StateError(
            f"There is an adapter {adapter_name!r} already. Give the new one a name of its own (adapter_name=...), or "
            "take the plain model, which convlora.remove(model) gives. Nothing was changed."
        )


def the_adapter(injection: Injection, adapter_name: str | None) -> Adapter:
    """The adapter of this name; None for the active one.

    Raises:
        StateError: there is none of this name; or several are active, and none was named.
    """
    if adapter_name is None and injection.blend:
        raise StateError(
            f"Adapters are active by weight, {injection.blend.weights}: name one of them. convlora.combine_adapters "
            "makes one adapter of several, convlora.set_scale gives one another strength. Nothing was changed."
        )
    found = injection.adapters.get(injection.active if adapter_name is None else adapter_name)
    if found is None:
        there = ", ".join(map(repr, injection.adapters))
        raise StateError(f"There is no adapter {adapter_name!r}; there is {there}.")
    return found


def check_plain(model: nn.Module) -> None:
    """Raise StateError where a part of the model carries an adapter already, or is a part of what does."""
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
    """Raise StateError where the model's numbers are not here: on the meta device, or sharded over processes."""
    for name, tensor in (*root.named_parameters(), *root.named_buffers()):
        if tensor.is_meta:
            raise StateError(f"{name} is on the meta device and has no values. Nothing was changed.")
        if hasattr(tensor, "device_mesh") or hasattr(tensor, "_fsdp_flattened"):
            raise StateError(IN_SHARDS.format(name))
    for name, module in root.named_modules():
        if SHARDED in vars(module) and any(isinstance(value, Tensor) for value in vars(module).values()):
            raise StateError(IN_SHARDS.format(name))  # a view of FSDP's flat parameter, in a parameter's place


def check_intact(root: nn.Module, injection: Injection) -> None:
    """Raise StateError where numbers are elsewhere, or a module was replaced since: it would be passed over."""
    check_whole(root)
    replaced = replaced_modules(root, injection)
    if replaced:
        raise StateError(
            f"{', '.join(replaced)} of {type(root).__name__} was replaced after convlora.inject, and the adapter is "
            "on the old module still. convlora.adopt(model) makes a new head the adapter's; else change a model before "
            "you inject: convlora.remove(model), change, inject again."
        )


def replaced_modules(root: nn.Module, injection: Injection) -> list[str]:
    """Names at which another module is now than the one that an adapter concerns."""
    # FSDP1 wraps a module where it stands: the later of the two is the module inside.
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
    """Raise StateError where other than one adapter at its own strength is active."""
    if injection.blend or injection.scales:
        what = (
            f"Adapters are active by weight, {injection.blend.weights}" if injection.blend else "A scaled block is open"
        )
        raise StateError(f"{what}; convlora.set_adapter one, outside of scaled blocks, first. Nothing was changed.")


def check_enabled(injection: Injection) -> None:
    """Raise StateError inside a ``disable_adapter`` block, and for a copy that was made inside one."""
    check_outside_blocks(injection)
    if injection.disabled:
        raise StateError(
            "Adapters are disabled: this copy was made inside a disable_adapter block. "
            f"convlora.set_adapter(model, {injection.active!r}) enables them. Nothing was changed."
        )


def check_unrouted(injection: Injection) -> None:
    """Raise StateError while a ``use_adapters`` block is open in any thread: it computes with what is there."""
    if injection.routed:
        raise StateError("A use_adapters block is open; leave every one of them first. Nothing was changed.")


def to_the_end(step: Callable[[], None]) -> None:
    """Run a step that may be run twice; an interrupt is let through when all is done, so that no half is left."""
    try:
        step()
    except BaseException:
        step()
        raise
