"""Carrying out a plan, all or nothing, and taking it back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from . import _norms
from ._layer import LoRA, adapters, attach, detach
from ._plan import NormPolicy, Plan
from ._planner import Pattern, plan
from ._state import RECORD, Injection, Taken, injected, the_injection, to_the_end
from ._swap import check_restorable
from ._targets import Targets
from .errors import UnsupportedLayerError

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
        model: any module; convolutions of every dimension and geometry, transposed too, and linear layers.
        rank: r, at least 1.
        alpha: the update is scaled by alpha / rank. Default: 2 · rank, so a scaling of 2 at every rank.
        target_modules: which layers; default every ``nn.Conv2d``. A type, a glob (``"layer4.*"``, ``"*.conv2"``),
            a compiled regular expression (matched in full), a predicate ``(name, module) -> bool``, or several of
            these. Conv1d, Conv3d, transposed and linear layers are adapted where a target names them. ``()`` adapts
            none: a probe of the head.
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
    _refuse_meta(model)
    injection = Injection(replace(plan, state="injected"))
    with torch.inference_mode(False):  # its tensors could not be trained
        layers = [(model.get_submodule(layer.name), layer) for layer in plan.layers]
        loras = [LoRA(m._parameters["weight"], p.rank, plan.scaling(p), plan.dropout) for m, p in layers]  # type: ignore[arg-type]
        try:
            names = (*(layer.name for layer in plan.layers), *plan.modules_to_save, *plan.norms)
            injection.modules.update({name: model.get_submodule(name) for name in names})
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


def _refuse_meta(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise UnsupportedLayerError(
                f"{name} is on the meta device and holds no numbers; load the base's weights before convlora.inject "
                "(convlora.plan works without). Nothing was changed."
            )


def _own_tensors(injection: Injection, model: nn.Module) -> None:
    """Give the adapter tensors of its own for all that training moves besides factors; the base's are kept aside.

    Every buffer is among them: not only statistics move in train mode.
    """
    plan, trained = injection.plan, set()
    for name in plan.modules_to_save:
        trained |= set(model.get_submodule(name).modules())
    owned = trained | {model.get_submodule(name) for name in plan.norms if plan.norm == "track"}
    copies: dict[int, Tensor] = {}  # by identity: tensors shared between modules stay shared
    for module in model.modules():
        for key, parameter in module._parameters.items() if module in owned else ():
            if parameter is not None:
                copy = nn.Parameter(parameter.detach().clone(), requires_grad=module in trained)
                _take(injection, module, key, parameter, copies.setdefault(id(parameter), copy))
        for key, buffer in module._buffers.items():
            if buffer is not None:
                _take(injection, module, key, buffer, copies.setdefault(id(buffer), buffer.clone()))


def _take(injection: Injection, module: nn.Module, key: str, base: Tensor, own: Tensor) -> None:
    taken = Taken(module, key, base)
    injection.taken.append(taken)
    taken.place[key] = own


def _freeze_base(injection: Injection, model: nn.Module) -> None:
    plan = injection.plan
    owned = {(taken.module, taken.name) for taken in injection.taken}
    injection.frozen += [
        (module, key)
        for module in model.modules()
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad and (module, key) not in owned
    ]
    for module, key in injection.frozen:
        module._parameters[key].requires_grad_(False)  # type: ignore[union-attr]
    for name in plan.norms if plan.norm == "freeze" else ():
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
        for module in (*injection.norms, *injection.layers):
            check_restorable(module)

    def undo() -> None:
        for _, root, injection in reversed(found):  # the inner parts were injected last
            _undo(injection, root)

    to_the_end(undo)
    return model


def _undo(injection: Injection, root: nn.Module) -> None:
    """Take back what was done, however much of it was; running it twice changes nothing more."""
    for layer in injection.layers:
        detach(layer)
    for norm in injection.norms:
        _norms.unfreeze(norm)
    for taken in [] if injection.is_merged else reversed(injection.taken):
        taken.give_back()
    for module, key in injection.frozen:
        _set_flag(module, key, True)
    for taken in injection.taken if injection.is_merged else ():  # what was trained stays, with the base's flags
        if taken.is_parameter:
            _set_flag(taken.module, taken.name, taken.tensor.requires_grad)
    vars(root).pop(RECORD, None)


def _set_flag(module: nn.Module, key: str, requires_grad: bool) -> None:
    parameter = module._parameters.get(key)
    if parameter is not None:  # the user may have pruned or dropped it since
        parameter.requires_grad_(requires_grad)


def summary(model: nn.Module) -> Plan:
    """What is in an injected model; ``print`` shows a table of layers, ranks, sizes, and what was skipped and why.

    >>> print(convlora.summary(model))
    >>> convlora.summary(model).trainable_share

    Raises:
        StateError: there is no adapter, or there are several injected parts; then give one of them.
    """
    return the_injection(model)[1].plan


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
