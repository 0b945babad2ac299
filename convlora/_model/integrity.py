"""``check``: finds what other code has changed in an injected model; ``adopt``: takes in a new head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, cast

from torch import Tensor, nn

from .._layer.adapted import AdaptedLayer, LayerAdapters, base_weight
from .._layer.change import Change
from .._layer.computed import has_parameter, weight_shape
from .._layer.places import BASE, MIXTURE, SWAPPING, Place
from .._plan import LayerPlan
from ..errors import StateError, few, warn
from .choice import geometry
from .norms import POLICIES, keeps_statistics
from .state import (
    Adapter,
    Blend,
    Injection,
    activate,
    check_enabled,
    check_unmerged,
    check_unrouted,
    injected,
    injections,
    replaced_modules,
    the_injection,
    untrained_biases,
)
from .targets import dotted

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Finding:
    """One change that other code has made to an injected model.

    Attributes:
        name: the name of the module, parameter or buffer.
        what: what was found.
        remedy: what to do about it.
        level: ``"refused"``: training, saving and merging raise an error; ``"unsaved"``: only saving raises an error;
            ``"warned"``: a warning at the start of a training; ``"noted"``: only :func:`check` reports it.
    """

    name: str
    what: str
    remedy: str
    level: Literal["refused", "unsaved", "warned", "noted"]

    def __str__(self) -> str:
        return f"{self.name}: {self.what}. {self.remedy}"


def check(model: nn.Module) -> list[Finding]:
    """Return what other code has changed in an injected model, and what to do about it; an empty list if nothing.

    >>> for finding in convlora.check(model):
    ...     print(finding)

    It finds replaced modules and heads; changed classes; norm statistics that were removed or written by hand;
    parameters of the base that are trained; factors and heads that are not trained; and buffers that were registered
    later. :func:`trainable_parameters`, the callbacks, :func:`merge` and :func:`save_adapter` run the same checks, and
    raise errors or warn.

    Args:
        model: an injected model.

    Raises:
        StateError: there is no adapter.
    """
    parts = injected(model)
    named = (
        (name, finding)
        for name, root, injection in parts
        for finding in (
            *_findings(root, injection),
            *(each for adapter in injection.adapters.values() for each in _computed(adapter)),
            *_moved(injection),
        )
    )
    return [replace(finding, name=dotted(name, finding.name)) for name, finding in named]


def refuse_changed(root: nn.Module, injection: Injection, saved: Adapter | None = None) -> None:
    """Raise StateError for changes with which training, merging, or saving that adapter would go wrong."""
    faults = [finding for finding in _findings(root, injection) if finding.level == "refused"]
    faults += _computed(saved) if saved is not None else ()
    if faults:
        raise StateError(f"{type(root).__name__} is no longer as convlora.inject left it:\n  {_listed(faults)}")


def check_trainable(model: nn.Module) -> None:
    """Raise as :func:`refuse_changed` does, and warn of other findings that affect a training."""
    for _, root, injection in injected(model):
        refuse_changed(root, injection)
        told = [finding for finding in _findings(root, injection) if finding.level == "warned"]
        if told:
            text = f"{type(root).__name__} is no longer as convlora.inject left it:\n  {_listed(told)}"
            warn(text)


def _listed(findings: list[Finding]) -> str:
    return "\n  ".join(few([*map(str, findings)], "and {} more; convlora.check(model) lists all"))


def _findings(root: nn.Module, injection: Injection) -> Iterator[Finding]:
    adapter = injection.adapters[injection.active]
    yield from _replaced(root, injection)
    lost = [(name, each.plan.adapter_name) for each in injection.adapters.values() for name in each.lost()]
    for name, owner in lost:
        again = "Put them back, or build the base anew and load the adapter that you saved"
        yield Finding(name, f"the factors of adapter {owner!r} were deleted", again, "refused")
    if lost:
        return
    names = {module: name or "the model" for name, module in root.named_modules()}
    yield from _classes(injection, adapter, names)
    yield from _flags(root, injection, adapter, names)
    yield from _later(injection, names)


def _replaced(root: nn.Module, injection: Injection) -> Iterator[Finding]:
    heads = {name for each in injection.adapters.values() for name in each.plan.modules_to_save}
    for name in replaced_modules(root, injection):
        remedy = "Put the old module back, or convlora.remove(model), change it, and inject again"
        if name in heads:
            remedy = f"convlora.adopt(model, {name!r}) makes the new one the adapter's"
        yield Finding(
            name, "it was replaced after convlora.inject; the adapter is on the old module", remedy, "refused"
        )


def _classes(injection: Injection, adapter: Adapter, names: dict[nn.Module, str]) -> Iterator[Finding]:
    again = "Save what you need of it, convlora.remove(model), and inject again"
    for layer in () if injection.merged else injection.layers:
        if layer in names and not isinstance(layer, AdaptedLayer):
            what = f"its class is {type(layer).__name__}, which does not apply the adapter"
            yield Finding(names[layer], what, again, "refused")
    for norm in adapter.norms:
        policy = injection.policy(norm, Blend.of(injection.now), injection.disabled)
        if norm in names and policy and not isinstance(norm, POLICIES[policy]):
            what = f"its class is {type(norm).__name__}, which does not apply norm={policy!r}"
            yield Finding(names[norm], what, again, "refused")
    for place in injection.places:
        taken = place.now is None and place.name.startswith("running_") and place.of(BASE) is not None
        if place.module in names and place.module in adapter.norms and taken:
            what = f"its {place.name} was removed, which a saved adapter cannot express"
            yield Finding(names[place.module], what, "Put it back", "refused")


def _computed(adapter: Adapter) -> Iterator[Finding]:
    """Yield the layers whose factors are computed by other code, which a file cannot express."""
    for planned, change in zip(adapter.plan.layers, () if adapter.lost() else adapter.changes, strict=False):
        if change.sources() is None:
            what = (
                f"its factors in adapter {adapter.plan.adapter_name!r} are pruned or parametrized: they cannot be saved"
            )
            remedy = "prune.remove or parametrize.remove_parametrizations (torch.nn.utils) makes them plain parameters"
            yield Finding(planned.name, what, remedy, "unsaved")


def _flags(root: nn.Module, injection: Injection, adapter: Adapter, names: dict[nn.Module, str]) -> Iterator[Finding]:
    nested = [each for _, _, each in injections(root)]  # this one, and parts injected inside it
    known = {id(place.now) for each in nested for place in each.places if place.is_parameter}
    known |= {id(factor) for each in nested for other in each.adapters.values() for factor in other.parameters()}
    inside_new = tuple(f"{name}." for name in replaced_modules(root, injection))
    for name, parameter in root.named_parameters():
        if parameter.requires_grad and id(parameter) not in known and not name.startswith(inside_new):
            what = "it requires a gradient but belongs to the base, which is not saved"
            remedy = "Freeze it with requires_grad_(False), or name its module in modules_to_save when you inject"
            yield Finding(name, what, remedy, "warned")
    if injection.merged or injection.disabled:
        return
    thaw = "Its requires_grad is False: set it to True if it should be trained"
    for place in untrained_biases(injection):
        if place.module in names:
            what = "the bias is a mixture of adapters' biases, and is not trained"
            remedy = "Train with weight and strength 1 if it should be trained"
            yield Finding(f"{names[place.module]}.bias", what, remedy, "warned")
    trained_now = [injection.adapters[name] for name in injection.trained]
    for layer, change in ((*pair,) for each in trained_now for pair in zip(each.layers, each.changes, strict=True)):
        if layer in names and not any(factor.requires_grad for factor in change.parameters()):
            yield Finding(names[layer], "its factors are frozen", thaw, "warned")
        weight = base_weight(layer) if has_parameter(layer) else None
        if weight is not None and weight.device != (own := next(change.parameters())).device:
            what = f"its factors are on {own.device}, its weight on {weight.device}"
            yield Finding(names.get(layer, "a layer"), what, "Move the whole model", "warned")
    saved = {root.get_submodule(name) for name in adapter.plan.modules_to_save if name in names.values()}
    trained = {module for each in saved for module in each.modules()}
    for place in injection.places:
        now = place.now
        is_own = place.is_parameter and place.module in trained and place.owner != MIXTURE
        if is_own and now is not None and not now.requires_grad:
            name = f"{names[place.module]}.{place.name}"
            yield Finding(name, "its module is trained in full, but it is frozen", thaw, "warned")


def _later(injection: Injection, names: dict[nn.Module, str]) -> Iterator[Finding]:
    known = {(place.module, place.name) for place in injection.places}
    for module, name in names.items():
        for key in () if isinstance(module, (LayerAdapters, Change)) else module._buffers:
            if (module, key) not in known and key not in module._non_persistent_buffers_set:
                what = "this buffer was registered after convlora.inject, so a freshly built base will not have it"
                yield Finding(f"{name}.{key}", what, "Register it before you inject, or as persistent=False", "warned")


def _moved(injection: Injection) -> Iterator[Finding]:
    """Yield the frozen norms whose statistics are no longer the base's."""
    for adapter in injection.adapters.values():
        names = {module: name for name, module in adapter.modules.items()}
        owner = adapter.plan.adapter_name
        for place in injection.places:
            if adapter.norms.get(place.module) != "freeze" or not place.name.startswith("running_"):
                continue
            if place.of(BASE) is not None and place.has_moved(owner):
                name = f"{names[place.module]}.{place.name}"
                what = f"the norm is frozen, and its statistics in adapter {owner!r} are not the base's"
                yield Finding(name, what, 'They are saved with the adapter; norm="track" also updates them', "noted")


def check_nothing_outside(model: nn.Module, root: nn.Module) -> None:
    """Raise StateError if modules outside the injected part are trained, since they would not be saved."""
    inside = {id(parameter) for parameter in root.parameters()}
    outside = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
    if outside:
        part = next(name for name, module in model.named_modules() if module is root)
        raise StateError(
            f"{', '.join(few(outside, 'and {} more'))}: trained outside the injected part {part!r} of "
            f"{type(model).__name__}, and would not be saved. Inject into the whole model, with "
            f"target_modules={part + '.*'!r} and these modules in modules_to_save; or save the adapter of "
            f"model.{part}, and the other modules yourself. Nothing was written."
        )


def adopt(model: M, *names: str) -> M:
    """Make a new head that replaced a head trained in full a part of the adapter, as if injected with it.

    >>> model.reset_classifier(num_classes=5)
    >>> convlora.adopt(model, "fc")

    From now on the new head is trained in full and saved. It keeps its Parameters, so an optimizer that holds them
    stays valid. The base gets a copy of their present values, which ``remove`` restores. A head without parameters
    (timm's ``num_classes=0``) is no longer saved.

    Args:
        model: an injected model.
        *names: the new heads' names; default all replaced heads.

    Returns:
        The same object.

    Raises:
        StateError: a name is not a replaced head; or the model is merged, disabled, or has several adapters.
    """
    root, injection = the_injection(model)
    with SWAPPING:
        for needed in (check_unmerged, check_enabled, check_unrouted):
            needed(injection)
        adapter = injection.adapters[injection.active]
        if len(injection.adapters) > 1:
            raise StateError("The other adapters have their own heads for the old module; delete those adapters first.")
        new = [name for name in replaced_modules(root, injection) if name in adapter.plan.modules_to_save]
        now = dict(root.named_modules(remove_duplicate=False))
        wrong = [name for name in names or new if name not in new or name not in now]
        if wrong or not new:
            raise StateError(
                f"{', '.join(wrong) or type(root).__name__}: no new module replaces one that was trained in full "
                f"({', '.join(adapter.plan.modules_to_save) or 'there is none'}). Nothing was changed."
            )
        _adopt(root, injection, adapter, {name: now[name] for name in names or new})
    return model


def _adopt(root: nn.Module, injection: Injection, adapter: Adapter, new: dict[str, nn.Module]) -> None:
    there = set(root.modules())
    injection.places = [place for place in injection.places if place.module in there]
    known = {(place.module, place.name) for place in injection.places}
    copies: dict[int, Tensor] = {}
    for module in dict.fromkeys(inner for each in new.values() for inner in each.modules()):
        for tensors, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for name, tensor in cast("dict[str, Tensor | None]", tensors).items():
                if (module, name) not in known and (tensor is not None or not is_parameter):
                    place = Place(module, name, is_parameter, owner=injection.active)
                    place.kept[BASE] = None if tensor is None else copies.setdefault(id(tensor), _copy(tensor))
                    injection.places.append(place)
                    if is_parameter and tensor is not None and tensor.requires_grad:
                        injection.frozen.append((module, name))
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.requires_grad_(True)
    injection.frozen = [(module, key) for module, key in injection.frozen if module in there]
    adapter.norms = {norm: policy for norm, policy in adapter.norms.items() if norm in there}
    adapter.norms |= {m: "track" for each in new.values() for m in each.modules() if keeps_statistics(m)}
    gone = [name for name, module in new.items() if next(module.parameters(), None) is None]
    adapter.modules = {name: new.get(name, module) for name, module in adapter.modules.items() if name not in gone}
    saved = tuple(name for name in adapter.plan.modules_to_save if name not in gone)
    adapter.plan = replace(
        adapter.plan,
        modules_to_save=saved,
        saved_parameters=_count(adapter.modules[name] for name in saved) + _biases(adapter),
        base_parameters=_count([root]) - sum(factor.numel() for factor in adapter.parameters()),
        skipped=tuple(_listed_anew(root, adapter, new)),
    )
    activate(root, injection, injection.now)


def _copy(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
    return tensor.clone()


def _count(modules: Iterator[nn.Module] | list[nn.Module]) -> int:
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


def _biases(adapter: Adapter) -> int:
    return sum(cast(Tensor, adapter.modules[name].bias).numel() for name in adapter.plan.biases)


def _listed_anew(root: nn.Module, adapter: Adapter, new: dict[str, nn.Module]) -> Iterator[LayerPlan]:
    """Yield the plan's skipped layers; those in a new head are described anew."""
    modules = dict(root.named_modules(remove_duplicate=False))
    for layer in adapter.plan.skipped:
        if not any(layer.name == name or layer.name.startswith(name + ".") for name in new):
            yield layer
        elif layer.name in modules and weight_shape(modules[layer.name]):
            module = modules[layer.name]
            kind, shape = type(module).__name__, weight_shape(module)
            yield replace(layer, kind=kind, weight_shape=shape, geometry=geometry(module))
