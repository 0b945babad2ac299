"""Injection: a plan is carried out completely, or the model stays as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .._layer.adapted import LayerAdapters, attach, base_weight
from .._layer.change import Change, Option
from .._layer.dora import channel_norms
from .._layer.functional import Factors
from .._layer.masked import Masks, mixin_for
from .._layer.masters import keep_in_fp32
from .._layer.paths import TrainingPath
from .._layer.places import BASE, SWAPPING, Place, own_copy
from .._methods.lora import LoRA
from .._plan import Init, LayerPlan, NormPolicy, Plan
from ..errors import UnsupportedLayerError
from .checks import check_model, warn_of_rebuilding
from .init import first_factors
from .norms import keeps_statistics
from .options import Budget, Pattern, Request, in_our_words
from .planner import make_plan
from .remove import delete, remove, set_flag, undo
from .state import RECORD, Adapter, Injection, activate, check_plain, check_unrouted, hook_state_dicts, injections
from .targets import Targets
from .watch import watch
from .written import watch_writes, written_in

M = TypeVar("M", bound=nn.Module)


@in_our_words
def inject(
    model: M,
    rank: int | None = None,
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
    use_dora: bool = False,
    freeze_A: bool = False,
    method: str = "lora",
    method_pattern: Mapping[Pattern, str] | None = None,
    method_options: Mapping[str, Option] | None = None,
    init: Init | None = None,
    init_data: Iterable[Any] | None = None,
    budget: Budget | None = None,
    importance: Mapping[str, float] | None = None,
    example: Any = None,
    training_path: TrainingPath = "auto",
    mask_activations: Masks = False,
    adapter_name: str = "default",
) -> M:
    """Put a LoRA adapter into a model, in place: the base is frozen, the factors and the head are trainable.

    >>> model = timm.create_model("resnet50", pretrained=True, num_classes=1)
    >>> convlora.inject(model, rank=8)
    >>> print(convlora.summary(model))
    >>> optimizer = torch.optim.AdamW(convlora.trainable_parameters(model), lr=2e-3)

    A layer's weight becomes W + scaling · B A (Hu et al. 2021, arXiv:2106.09685), with A of shape
    ``(rank, C_in / groups, kH, kW)`` and B of ``(C_out, rank)`` for a 2-D convolution, ``(rank, in_features)`` and
    ``(out_features, rank)`` for a linear layer. A fresh adapter changes no output. Where the factors
    would have more parameters than their layer, its difference is trained in full instead, which has as many parameters
    as the layer; the summary says where. Create the optimizer after this call, and wrap in DDP or torch.compile after
    it.

    Args:
        model: any module; convolutions of every dimension and geometry, transposed too, and linear layers.
        rank: r, at least 1; default 8. With a budget the largest that a layer may get, default any.
        alpha: the update is scaled by alpha / rank. Default: 2 · rank, so a scaling of 2 at every rank.
        target_modules: which layers; default every convolution, 1-D to 3-D and transposed. A type, a glob
            (``"layer4.*"``, ``"*.conv2"``), a compiled regular expression (matched in full), a predicate ``(name,
            module) -> bool``, or several of these. Linear layers are adapted where a target
            names them. ``()`` adapts none: a probe of the head.
        exclude_modules: layers to skip, named in the same ways.
        rank_pattern: another rank for the layers that a glob or regular expression names; the first match counts.
        alpha_pattern: likewise for alpha.
        modules_to_save: modules trained in full and saved with the adapter. ``"auto"`` finds the heads, as
            ``docs/layers.md`` says, and warns where layers that may be new would stay frozen; None means none; else
            named as above.
        norm: ``"freeze"`` keeps norm layers with running statistics in eval behaviour also under
            ``model.train()``; ``"track"`` lets the statistics move, and they belong to the adapter.
        dropout: probability of dropping an input of the adapter's branch in training; 0 ≤ dropout < 1.
        use_rslora: scale by alpha / √rank (Kalajdzievski 2023, arXiv:2312.03732).
        use_dora: train the magnitude and the direction of each output channel's weight separately (Liu et al. 2024,
            arXiv:2402.09353).
        freeze_A: train B alone; A keeps its initial values (Zhang et al. 2023, arXiv:2308.03303). A convolution then
            keeps A ∗ x, of r channels, for the backward instead of its input. See ``docs/methods.md``.
        method: how a weight may change: ``"lora"``, or another of ``docs/methods.md``. What is said above of the
            factors holds for LoRA; in every method a fresh adapter changes no output.
        method_pattern: another method for the layers that a glob or regular expression names; the first match counts.
        method_options: further options of ``method``, by name.
        init: the initialisation of the factors: ``"kaiming"``, ``"gaussian"``, ``"orthogonal"``; ``"pissa"`` and
            ``"olora"`` from the base's weight; ``"eva"`` from data. None means ``"eva"`` where ``init_data`` are given,
            else ``"kaiming"``. See ``docs/methods.md``.
        init_data: what the training sees: a loader whose batches are tensors, tuples or lists that begin with one, or
            dicts; or one batch as a tensor. The base reads them in eval mode, until what it looks for stands still: a
            few batches as a rule. The model is as it was afterwards.
        budget: how many numbers the factors may hold together, the head not counted: ``"1%"`` or 0.01 of the base's
            parameters, or a whole number. Ranks are as equal as that allows.
        importance: with a budget, a score for each layer by name, as :func:`convlora.sensitivity` gives them; ranks are
            then in proportion to the scores.
        example: what the model takes: one argument, a tuple of arguments or a dict of keyword arguments. One
            forward without gradients, in eval mode, finds the layers whose outputs are the model's; the model is as
            it was afterwards.
        training_path: how a plain convolution computes in training: ``"auto"`` chooses from each layer's shapes among
            ``"fused"``, ``"weight"`` and ``"branch"``. They differ in time, memory and rounding only.
        mask_activations: let ReLU, ReLU6, LeakyReLU and Hardtanh keep a mask for the backward in place of their output,
            a byte a number or, with ``"bits"``, a bit; max pooling the places of its maxima, average pooling nothing.
            No bit of forward or gradient changes. See ``docs/lean.md``.
        adapter_name: names the adapter in the state dict; no dots.

    Returns:
        The same object.

    Raises:
        TargetError: an argument is out of range, or a pattern matches no layer (the nearest names are given).
        UnsupportedLayerError: a layer or wrapper cannot carry an adapter.
        StateError: the model carries an adapter already.

    Whatever is raised, the model is as it was.
    """
    request = Request.of(locals())
    inject_requested(request, model)
    warn_of_rebuilding(model)
    return model


def inject_requested(request: Request, model: M) -> M:
    """Inject a requested adapter into a model that carries none."""
    check_model(model)
    check_plain(model)
    return add_requested(request, model)


def add_requested(request: Request, model: M) -> M:
    """Add a requested adapter, which is to be trained, to a base that may carry others."""
    plan = make_plan(model, request)
    refuse_meta(model)
    return apply(plan, model, first_factors(plan, model, request.init_data))


def apply(plan: Plan, model: M, factors: Mapping[str, Factors] | None = None) -> M:
    """Carry out a plan on a base. Beside other adapters, the new one is added without being activated.

    On any error, an interrupt included, the model is as it was.

    Args:
        plan: the plan.
        model: the base.
        factors: the initial A and B by layer name; for other layers A is random and B zero.
    """
    refuse_meta(model)
    with SWAPPING:
        return _apply(plan, model, factors or {})


def _apply(plan: Plan, model: M, given: Mapping[str, Factors]) -> M:
    injection = vars(model).get(RECORD, Injection())
    check_unrouted(injection)
    adapter = recorded(plan, model)
    first = not injection.adapters
    try:
        with torch.inference_mode(False):  # its tensors could not be trained
            changes = [_new_change(m, p, plan, given) for m, p in zip(adapter.layers, plan.layers, strict=True)]
            injection.adapters[plan.adapter_name] = adapter
            if first:
                _freeze_base(injection, model)
            _give_own_tensors(injection, adapter, model)
            for layer, change in zip(adapter.layers, changes, strict=True):
                attach(layer, plan.adapter_name, change)
            vars(model)[RECORD] = injection
            hook_state_dicts(model)
            if first:
                watch_writes(model, injection)
            watch(model)
            activate(model, injection, plan.adapter_name if first else injection.now, injection.disabled)
    except BaseException:
        if first:
            undo(injection, model)
        else:
            delete(injection, plan.adapter_name)
        raise
    return model


def recorded(plan: Plan, model: nn.Module) -> Adapter:
    """Make the record of an adapter with this plan."""
    return Adapter(
        plan=plan,
        modules={name: model.get_submodule(name) for name in _names(plan)},
        layers=[model.get_submodule(layer.name) for layer in plan.layers],
        norms=_norm_policies(plan, model),
        activations=[m for m in model.modules() if mixin_for(m, plan.mask_activations)],
    )


@contextmanager
def applied(plan: Plan, root: nn.Module) -> Iterator[None]:
    """Carry out the plan; undo it if the block, which loads the adapter's tensors, fails."""
    before = vars(root).get(RECORD)
    try:
        apply(plan, root)
        yield
    except BaseException:
        if isinstance(before, Injection):
            delete(before, plan.adapter_name)
        elif list(injections(root)):
            remove(root)
        raise


def _names(plan: Plan) -> tuple[str, ...]:
    return (*(layer.name for layer in plan.layers), *plan.modules_to_save, *plan.norms, *plan.biases)


def _new_change(layer: nn.Module, planned: LayerPlan, plan: Plan, given: Mapping[str, Factors]) -> Change:
    like = next(p for p in layer.parameters() if p.is_floating_point())
    change = planned.change(
        planned.weight_shape,
        like,
        planned.rank,
        planned.scaling,
        plan.dropout,
        plan.training_path,
        **(planned.channels | planned.options),
    )
    change.strength = planned.strength
    if plan.freeze_A and isinstance(change, LoRA):
        change.lora_A.requires_grad_(False)
    if planned.name in given:
        cast(LoRA, change).set_factors(*given[planned.name])
    if planned.use_dora:
        base = base_weight(layer).detach().to(change.own_dtype()).view(planned.weight_shape)
        change.give_magnitudes(channel_norms(base, planned.transposed_groups))
    return change


def _norm_policies(plan: Plan, model: nn.Module) -> dict[nn.Module, NormPolicy]:
    """Return each norm's policy: the plan's, but ``"track"`` inside modules that are trained in full."""
    policies: dict[nn.Module, NormPolicy] = {model.get_submodule(name): plan.norm for name in plan.norms}
    saved = (module for name in plan.modules_to_save for module in model.get_submodule(name).modules())
    return policies | {module: "track" for module in saved if keeps_statistics(module)}


def refuse_meta(model: nn.Module) -> None:
    """Raise UnsupportedLayerError if a tensor of the model is on the meta device, where it has no values."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise UnsupportedLayerError(
                f"{name} is on the meta device and has no values; load the base's weights before convlora.inject "
                "(convlora.plan works without). Nothing was changed."
            )


def _freeze_base(injection: Injection, model: nn.Module) -> None:
    injection.frozen += [
        (module, key)
        for module in model.modules()
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    for module, key in injection.frozen:
        set_flag(module, key, False)


def _give_own_tensors(injection: Injection, adapter: Adapter, model: nn.Module) -> None:
    """Copy for the adapter each tensor, besides factors, that training changes; it is kept until the adapter is active.

    All buffers are copied, since train mode may change other buffers than running statistics. Parameters that forwards
    write to are copied too.
    """
    plan = adapter.plan
    in_full = {module for name in plan.modules_to_save for module in model.get_submodule(name).modules()}
    with_bias = {model.get_submodule(name) for name in plan.biases}
    copies: dict[int, Tensor] = {}  # by identity: tensors shared between modules stay shared
    for place in _places_changed(injection, adapter, model, in_full, with_bias):
        module, name, base = place.module, place.name, place.of(BASE)
        is_trained, dtype = module in with_bias and name == "bias", None if base is None else base.dtype
        if module in in_full and isinstance(base, nn.Parameter):
            # Also for a tied parameter that is copied already: each of its modules must read it in the base's dtype.
            is_trained = True
            dtype = torch.float32 if keep_in_fp32(module, name, base, module in adapter.norms) else dtype
        if base is not None and id(base) not in copies:
            copies[id(base)] = own_copy(base, is_trained, dtype)
        place.kept[plan.adapter_name] = None if base is None else copies[id(base)]


def _places_changed(
    injection: Injection, adapter: Adapter, model: nn.Module, in_full: set[nn.Module], with_bias: set[nn.Module]
) -> Iterator[Place]:
    """Yield the places whose tensors training the adapter changes; places that are new are added to the record."""
    owned = in_full | {norm for norm, policy in adapter.norms.items() if policy == "track"}
    places = {(place.module, place.name): place for place in injection.places}
    written = {key for key, place in places.items() if place.is_written} | written_in(adapter.plan, model)
    for module in (m for m in model.modules() if not isinstance(m, (LayerAdapters, Change))):
        names = [
            name
            for name, parameter in module._parameters.items()
            if parameter is not None
            and (module in owned or (module in with_bias and name == "bias") or (module, name) in written)
        ]
        for name in (*names, *module._buffers):
            if (module, name) not in places:
                is_written = (module, name) in written
                places[module, name] = Place(module, name, is_parameter=name in names, is_written=is_written)
                injection.places.append(places[module, name])
            yield places[module, name]
