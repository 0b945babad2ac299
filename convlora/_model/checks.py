"""Checks by which a plan is refused: arguments out of range, wrapped models, layers that cannot be adapted."""

from __future__ import annotations

import gc
from numbers import Integral

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .._layer.adapted import CHILD, AdaptedLayer, supports_dropout
from .._layer.change import Change
from .._layer.computed import has_parameter
from .._layer.swap import original_class
from .._methods.registry import METHODS, check_options
from .._plan import LayerPlan, Plan
from ..errors import TargetError, UnsupportedLayerError, warn
from .options import MORE_THAN_ANY, Request, check_alpha, check_among, check_number, checked_rank
from .targets import Named, is_convolution


def check_variant(n: Named, change: type[Change], init: str, use_dora: bool) -> None:
    """Raise UnsupportedLayerError where DoRA or EVA is asked for and not defined for the layer."""
    if use_dora and not has_parameter(n.module):
        raise UnsupportedLayerError(
            f"{n.name}: its weight is computed (weight_norm, spectral_norm), and DoRA's magnitudes need one that "
            "stays. Use use_dora=False or exclude_modules. Nothing was changed."
        )
    if (
        init == "eva"
        and init in change.inits
        and not isinstance(n.module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    ):
        raise UnsupportedLayerError(
            f"{n.name}: init='eva' reads the input patches of nn.Linear and of torch's convolutions that are not "
            f"transposed; this is a {original_class(n.module).__name__}. Use another init or exclude_modules. "
            "Nothing was changed."
        )


def check_any_conv(adaptable: list[Named], model: nn.Module) -> None:
    """Raise TargetError if the model has no convolution, since these are the default targets."""
    if not any(is_convolution(n.module) for n in adaptable):
        raise TargetError(
            f"{type(model).__name__} has no convolution. For linear layers name their type, target_modules=nn.Linear; "
            "for a probe of the head alone, target_modules=(). Nothing was changed."
        )


def check_any_left(layers: list[LayerPlan], targets: set[nn.Module], saved: list[Named], model: nn.Module) -> None:
    """Raise TargetError if no target can be adapted, or if the adapter would train nothing."""
    if targets and not any(layer.rank for layer in layers):
        name = type(model).__name__
        remedy = "Name other layers, a rank or a method that they have; target_modules=() trains the head alone."
        reasons = "; ".join(f"{p.name or name}: {p.note}" for p in layers if p.note != "not a target")
        raise TargetError(f"No layer of {name} would be adapted ({reasons}). {remedy} Nothing was changed.")
    if not targets and not saved:
        raise TargetError("Without targets and without modules_to_save nothing would train. Nothing was changed.")


WRAPPERS = {
    "DistributedDataParallel": "Unwrap it (`model.module`): inject first, then wrap",
    "DataParallel": "Unwrap it (`model.module`): inject first, then wrap",
    "FullyShardedDataParallel": "Unwrap it (`model.module`): inject first, then wrap",
    "FSDPModule": "Inject first, then shard",
    "OptimizedModule": "Unwrap it (`model._orig_mod`): inject first, then torch.compile",
    "ScriptModule": "Inject into the Python module, then trace it",
}


def check_is_module(model: nn.Module) -> None:
    """Raise TargetError if the model is not a module."""
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"of type {type(model).__name__}"
        raise TargetError(
            f"model is {what}; it must be a torch.nn.Module: the network itself, built and with its weights loaded, "
            "not its name, class, parameters or state dict. Nothing was changed."
        )


def check_model(model: nn.Module) -> None:
    """Raise if the model is not a module, is wrapped, compiled or sharded, or has a lazy layer without a shape."""
    check_is_module(model)
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls.__name__ == "BaseTunerLayer" and cls.__module__.startswith("peft."):
                raise UnsupportedLayerError(
                    f"{name or 'the model'} carries an adapter of peft, whose factors would be adapted too. Take the "
                    "base first: peft_model.unload(), or convlora.peft.from_peft(peft_model). Nothing was changed."
                )
            if cls.__name__ in WRAPPERS and cls.__module__.startswith("torch."):
                where = name or "the model"
                raise UnsupportedLayerError(
                    f"{where} is wrapped: {cls.__name__}. {WRAPPERS[cls.__name__]}. Nothing was changed."
                )
        if any(nn.parameter.is_lazy(tensor) for tensor in (*module._parameters.values(), *module._buffers.values())):
            raise UnsupportedLayerError(
                f"{name}: {type(module).__name__} has no shape yet; run one batch through the model before "
                "convlora.inject. Nothing was changed."
            )


def warn_of_rebuilding(model: nn.Module) -> None:
    """Warn where ``train()`` of a library would make a new network of this one, and train all of it."""
    held = (module for module in model.modules() if hasattr(module, "task") and hasattr(module, "yaml"))
    if any(cls.__module__ == "ultralytics.nn.tasks" for module in held for cls in type(module).__mro__):
        warn(
            "Ultralytics' train() makes a new network of this one and trains all of it, without the adapter. Give it a "
            "trainer that injects: train(trainer=…), as docs/tutorials/ultralytics.md says. In a loop of your own, and "
            "for inference, there is nothing to do.",
        )


def check_not_ddp(model: nn.Module) -> None:
    """Raise if the model is in a DDP, which would go on averaging the gradients of another adapter's parameters."""
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise UnsupportedLayerError(
            "The model is wrapped in DistributedDataParallel, which would not average the gradients of another "
            "adapter. Call convlora.set_adapter on the unwrapped model (ddp.module), then wrap it again before you "
            "train. Nothing was changed."
        )


def warn_of_ddp(root: nn.Module) -> None:
    """Warn if a DDP that holds the model would not average the gradients of the adapter that is active now."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    ddp = nn.parallel.DistributedDataParallel
    wrappers = [each for each in gc.get_objects() if issubclass(type(each), ddp)]  # isinstance could run a proxy's code
    if any(module is root for wrapper in wrappers for module in wrapper.modules()):
        warn(
            f"A DistributedDataParallel holds this {type(root).__name__}, and would not average the gradients of the "
            "adapter that is active now: each process would train its own. Wrap the model again before you train.",
        )


def check_adaptable(n: Named, dropout: float) -> None:
    """Raise unless the layer has a plain floating-point weight, and a plain forward if dropout is asked for."""
    weight = n.module._parameters.get("weight")
    if weight is not None and not weight.is_floating_point():
        raise UnsupportedLayerError(f"{n.name}: its weight does not hold floating-point numbers; use exclude_modules.")
    if weight is not None and is_traceable_wrapper_subclass(weight):
        raise UnsupportedLayerError(
            f"{n.name}: its weight is a {type(weight).__name__}, not a plain tensor (quantized or sharded?). Inject "
            "first and quantize after convlora.merge and remove, or use exclude_modules. Nothing was changed."
        )
    if hasattr(n.module, CHILD) and not isinstance(n.module, AdaptedLayer):
        raise UnsupportedLayerError(f"{n.name} has an attribute named {CHILD!r} already; use exclude_modules.")
    if weight is not None and weight.dtype.itemsize < 2:
        raise UnsupportedLayerError(
            f"{n.name}: its weight is {weight.dtype}, in which torch computes no sums. Inject into the network in "
            "bfloat16 or wider and quantize after convlora.merge and remove, or use exclude_modules. Nothing was "
            "changed."
        )
    if dropout and "forward" in vars(n.module) and not isinstance(n.module, AdaptedLayer):
        raise UnsupportedLayerError(
            f"{n.name}: dropout would not be applied, since this layer has a forward on the instance, which runs in "
            "the adapted layer's place (a hook of accelerate, say). Inject first and put it there afterwards, `del` "
            "it, or use dropout=0 or exclude_modules. Nothing was changed."
        )
    if dropout and not supports_dropout(n.module):
        raise UnsupportedLayerError(
            f"{n.name}: dropout needs the plain forward of a torch convolution or nn.Linear, and this is a "
            f"{original_class(n.module).__name__}. Use dropout=0 or exclude_modules. Nothing was changed."
        )


def check_plan(plan: Plan) -> None:
    """Raise TargetError if a plan from a file has a value that :func:`plan` would not have given it."""
    Request.of(vars(plan))
    checked_rank(plan.rank, "rank")
    check_alpha(plan.alpha, "alpha")
    names = [layer.name for layer in plan.layers]
    for name in (*names, *plan.modules_to_save, *plan.norms, *plan.biases, *plan.written):
        if not isinstance(name, str):
            raise TargetError(f"{name!r} is not a layer name.")
    if plan.rank > MORE_THAN_ANY:
        raise TargetError(f"rank={plan.rank}; no layer has so high a rank.")
    if len(set(names)) < len(names):
        raise TargetError("a layer is listed twice.")
    for layer in plan.layers:
        checked_rank(layer.rank, f"rank of {layer.name}")
        check_alpha(layer.scaling, f"scaling of {layer.name}")
        check_number(layer.strength, f"strength of {layer.name}")
        check_among(tuple(METHODS), layer.method, f"method of {layer.name}")
        check_options(layer.method, layer.options)
        if not isinstance(layer.use_dora, bool):
            raise TargetError(f"{layer.name}: use_dora must be true or false.")
        sizes = layer.weight_shape
        if (
            len(sizes) < 2
            or not all(isinstance(n, int) and n > 0 for n in sizes)
            or not isinstance(layer.geometry, dict)
        ):
            raise TargetError(f"{layer.name}: weight {sizes!r} and geometry {layer.geometry!r} are no layer's.")
        groups = layer.geometry.get("groups", 1)
        if type(groups) is not int or not 0 < groups < MORE_THAN_ANY:
            raise TargetError(f"{layer.name}: {groups!r} groups are no layer's.")
        try:
            _ = layer.stored_shapes
        except TargetError as cause:
            raise TargetError(f"{layer.name}: {cause}") from cause
    for layer in plan.skipped:
        check_among(tuple(METHODS), layer.method, f"method of {layer.name}")
    _check_shown(plan)


def _check_shown(plan: Plan) -> None:
    """Check the values that are only shown, so that they cannot garble a table or a terminal."""
    listed = (*plan.layers, *plan.skipped)
    texts = [plan.model, plan.head_found_by, plan.state, *plan.notes]
    texts += [text for each in listed for text in (each.name, each.kind, each.note)]
    texts += [text for part in plan.others for text in (part.name, part.kind)]
    for text in texts:
        if not isinstance(text, str) or not text.isprintable():
            raise TargetError(f"{text!r} is no text to show.")
    if any(each.rank for each in plan.skipped):
        raise TargetError("a skipped layer has a rank.")
    counts = [plan.base_parameters, plan.saved_parameters, *(part.parameters for part in plan.others)]
    counts += [n for each in listed for n in (*each.weight_shape, each.rank)]
    for count in counts:
        if not isinstance(count, Integral) or not 0 <= count < 2**63:
            raise TargetError(f"{count!r} is no number of parameters.")
