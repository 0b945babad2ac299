"""Carrying out a plan, all or nothing, and taking it back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

from torch import Tensor, nn

from . import _norms
from ._layer import LoRA, adapters, attach, detach
from ._plan import NormPolicy, Plan
from ._planner import Pattern, plan
from ._state import RECORD, Injection, Taken, injected
from ._swap import check_restorable
from ._targets import Targets
from .errors import StateError

M = TypeVar("M", bound=nn.Module)


def inject(
    model: M,
    rank: int = 8,
    *,
    alpha: float | None = None,
    target_modules: Targets = None,
    exclude_modules: Targets = None,
    rank_pattern: Mapping[Pattern, int] | None = None,
    alpha_pattern: Mapping[Pattern, float] | None = None,
    modules_to_save: Targets = "auto",
    norm: NormPolicy = "freeze",
    dropout: float = 0.0,
    use_rslora: bool = False,
    adapter_name: str = "default",
) -> M:
    """Put a LoRA adapter into a model, in place: the base is frozen, the factors and the head are trainable.

    >>> model = timm.create_model("resnet50", pretrained=True, num_classes=1)
    >>> convlora.inject(model, rank=8)
    >>> print(convlora.summary(model))
    >>> optimizer = torch.optim.AdamW(convlora.trainable_parameters(model), lr=1e-3)

    Make the optimizer after this call, and wrap in DDP or torch.compile after it. A fresh adapter changes no output.
    A rank is lowered where the factors would outweigh their layer, and a layer that even rank 1 would outweigh is
    left alone; the summary says which.

    Args:
        model: any module; its ``nn.Conv2d`` layers of every geometry can be adapted, and its ``nn.Linear`` layers.
        rank: r, at least 1.
        alpha: the update is scaled by alpha / rank. Default: 2 · rank, so a scaling of 2 at every rank.
        target_modules: which layers; default every ``nn.Conv2d``. A type, a glob (``"layer4.*"``, ``"*.conv2"``),
            a compiled regular expression (matched in full), a predicate ``(name, module) -> bool``, or several of
            these. Linear layers are adapted where a target names them. ``()`` adapts none: a probe of the head.
        exclude_modules: layers to leave alone, named in the same ways.
        rank_pattern: another rank for the layers that a glob or regular expression names; the first match counts.
        alpha_pattern: likewise for alpha.
        modules_to_save: modules trained in full and saved with the adapter. ``"auto"`` finds the classifier;
            None means none; else named as above.
        norm: ``"freeze"`` keeps norm layers with running statistics in eval behaviour also under
            ``model.train()``; ``"track"`` lets the statistics move, and they belong to the adapter.
        dropout: probability of dropping an input of the adapter's branch in training; 0 ≤ dropout < 1.
        use_rslora: scale by alpha / √rank (Kalajdzievski 2023).
        adapter_name: names the adapter in the state dict; no dots.

    Returns:
        The same object.

    Raises:
        TargetError: an argument is out of range, or a pattern matches no layer (the nearest names are given).
        UnsupportedLayerError: a layer or wrapper cannot carry an adapter.
        StateError: the model carries an adapter already.

    Whatever is raised, the model is as it was.
    """
    return apply(
        plan(
            model,
            rank,
            alpha=alpha,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
            modules_to_save=modules_to_save,
            norm=norm,
            dropout=dropout,
            use_rslora=use_rslora,
            adapter_name=adapter_name,
        ),
        model,
    )


def apply(plan: Plan, model: M) -> M:
    """Carry out a plan; on any error, an interrupt included, the model is as it was."""
    layers = [(model.get_submodule(layer.name), layer) for layer in plan.layers]
    loras = [LoRA(m._parameters["weight"], p.rank, plan.scaling(p), plan.dropout) for m, p in layers]  # type: ignore[arg-type]
    injection = Injection(replace(plan, state="injected"))
    try:
        _own_tensors(injection, model)
        _freeze_base(injection, model)
        for (layer, _), lora in zip(layers, loras, strict=True):
            injection.layers.append(layer)
            attach(layer, plan.adapter_name, lora)
        vars(model)[RECORD] = injection
    except BaseException:
        _undo(injection, model)
        raise
    return model


def _own_tensors(injection: Injection, model: nn.Module) -> None:
    """Give the adapter tensors of its own for all that training moves besides factors; the base's are kept aside."""
    copies: dict[int, Tensor] = {}  # by identity: tensors shared between modules stay shared
    for name in injection.plan.modules_to_save:
        for module in model.get_submodule(name).modules():
            _own_module(injection, module, copies, trainable=True)
    for name in injection.plan.norms if injection.plan.norm == "track" else ():
        _own_module(injection, model.get_submodule(name), copies, trainable=False)


def _own_module(injection: Injection, module: nn.Module, copies: dict[int, Tensor], trainable: bool) -> None:
    for key, parameter in module._parameters.items():
        if parameter is not None:
            copy = nn.Parameter(parameter.detach().clone(), requires_grad=trainable)
            _take(injection, module, key, parameter, copies.setdefault(id(parameter), copy))
    for key, buffer in module._buffers.items():
        if buffer is not None:
            _take(injection, module, key, buffer, copies.setdefault(id(buffer), buffer.clone()))


def _take(injection: Injection, module: nn.Module, key: str, base: Tensor, own: Tensor) -> None:
    taken = Taken(module, key, base)
    injection.taken.append(taken)
    taken.replace(own)


def _freeze_base(injection: Injection, model: nn.Module) -> None:
    owned = {id(t.module._parameters.get(t.name)) for t in injection.taken}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and id(parameter) not in owned:
                injection.frozen.append((module, key))
                parameter.requires_grad_(False)
    if injection.plan.norm == "freeze":
        for name in injection.plan.norms:
            norm = model.get_submodule(name)
            injection.norms.append(norm)
            _norms.freeze(norm)


def remove(model: M) -> M:
    """Take the adapter out: the base as it was before :func:`inject`, or, where merged, the merged plain model.

    >>> model = convlora.remove(model)                    # the base: same objects, keys, classes, bits, flags
    >>> model = convlora.remove(convlora.merge(model))    # a plain model that predicts like the adapted one

    Unmerged, everything that training changed is lost with the adapter, the trained head and norm statistics too:
    :func:`convlora.save_adapter` first.

    Raises:
        StateError: there is no adapter, or another library has changed the class of an adapted layer since.
    """
    found = injected(model)
    for _, _, injection in found:
        for module in (*injection.norms, *([] if injection.is_merged else injection.layers)):
            check_restorable(module)
    for _, module, injection in found:
        _undo(injection, module)
    return model


def _undo(injection: Injection, model: nn.Module) -> None:
    for layer in injection.layers:
        detach(layer)
    for norm in injection.norms:
        _norms.unfreeze(norm)
    for taken in reversed(injection.taken):
        if not injection.is_merged:
            taken.give_back()
        elif isinstance(taken.tensor, nn.Parameter):  # the trained tensor stays, with the flag that the base's had
            taken.module._parameters[taken.name].requires_grad_(taken.tensor.requires_grad)  # type: ignore[union-attr]
    for module, key in injection.frozen:
        module._parameters[key].requires_grad_(True)  # type: ignore[union-attr]
    vars(model).pop(RECORD, None)


def summary(model: nn.Module) -> Plan:
    """What is in an injected model; ``print`` shows a table of layers, ranks, sizes, and what was skipped and why.

    >>> print(convlora.summary(model))
    >>> convlora.summary(model).trainable_share

    Raises:
        StateError: there is no adapter, or there are several injected parts; then give one of them.
    """
    return the_injection(model)[1].plan


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


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The factors lora_A and lora_B of every adapted layer, for an optimizer group of their own.

    Raises:
        StateError: there is no adapter.
    """
    for _, _, injection in injected(model):
        for layer in injection.layers:
            for lora in adapters(layer):
                yield from (lora.lora_A, lora.lora_B)


def trainable_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """All that an optimizer should have: the factors, the head, and whatever else requires a gradient.

    >>> optimizer = torch.optim.AdamW(convlora.trainable_parameters(model), lr=1e-3)

    Raises:
        StateError: there is no adapter.
    """
    injected(model)
    return (p for p in model.parameters() if p.requires_grad)
