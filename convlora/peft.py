"""Hugging Face peft: conversion of models in memory in both directions, and convlora's layers inside peft.

Only this file and ``_peft_layer.py`` import peft: ``pip install "convlora[peft]"``. For files peft is not needed:
:func:`convlora.save_adapter` and :func:`convlora.load_adapter` write and read peft's format.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ._checkpoint.contents import adapter_tensors
from ._checkpoint.loading import install
from ._checkpoint.manifest import Manifest
from ._checkpoint.peft_format import PREFIX, faults_for_any_peft, faults_for_stock_peft, peft_config, peft_type
from ._checkpoint.peft_methods import ALONE, REGISTERED, STOCK
from ._checkpoint.peft_reader import from_peft_tensors
from ._checkpoint.rebuilt import rebuild
from ._model.adapters import set_adapter
from ._model.checks import check_model
from ._model.remove import remove
from ._model.state import check_enabled, check_plain, check_single, check_unmerged, injections, ready_alone
from ._model.targets import dotted
from ._plan import Plan
from .errors import StateError, TargetError, UnsupportedLayerError

try:
    from peft import (
        LoraConfig,
        PeftConfig,
        PeftModel,
        __version__,
        get_peft_config,
        get_peft_model,
        get_peft_model_state_dict,
    )
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.tuners.lora import LoraModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper, hotswap, set_peft_model_state_dict

    from ._peft_layer import ConvLoraLayer, differs_from_stock
except ImportError as cause:
    raise ImportError(
        f"convlora.peft needs Hugging Face peft 0.15 or newer ({cause}): pip install 'convlora[peft]'."
    ) from cause

C = TypeVar("C")
SUPPORTED = "0.15.0 to 0.21.2"
"""The oldest and the newest tested release of peft."""


class ConvLoraConfig(LoraConfig):  # type: ignore[misc]
    """A LoraConfig of peft for which convolutions become convlora's layers; made by :func:`register`."""

    _differs: bool | None = None
    """Whether stock peft would predict something else for a layer built so far; None before the first layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._teach()

    def _teach(self) -> None:
        self._register_custom_module({_ConvNd: self._build})

    def _build(self, target: nn.Module, adapter_name: str, **kwargs: Any) -> nn.Module:
        layer = ConvLoraLayer(target, adapter_name, **kwargs)
        self.built(layer.get_base_layer())
        return layer

    def built(self, layer: nn.Module) -> None:
        """Note that a layer got an adapter with this configuration."""
        self._differs = bool(self._differs) or differs_from_stock(layer, self.use_dora)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that peft saves, with a ``peft_type`` that stock peft refuses if it would not agree."""
        fields: dict[str, Any] = super().to_dict()
        fields["peft_type"] = STOCK if self._differs is False else REGISTERED
        return fields


def register(lora_config: C | None = None) -> C | None:
    """Make ``get_peft_model`` build convlora's layers for all convolutions that a configuration targets.

    >>> config = convlora.peft.register(LoraConfig(target_modules=["conv1", "conv2"]))
    >>> model = peft.get_peft_model(base, config)

    These layers support depthwise, grouped, dilated, transposed and padded convolutions and subclasses with their own
    forward, also with DoRA and ``lora_bias``. They merge exactly, unmerge bit for bit, and have the same autograd as
    injected layers. Linear layers stay peft's. ``add_weighted_adapter`` and ``prepare_model_for_compiled_hotswap`` work
    too. Stock peft reads what ``save_pretrained`` writes if it predicts the same, and refuses it otherwise. After
    ``register`` was called once in a process, ``PeftModel.from_pretrained`` reads these files too.

    Args:
        lora_config: a ``peft.LoraConfig``, changed in place; with None, peft only learns to read the files.

    Returns:
        The same object.

    Raises:
        TargetError: ``lora_config`` is not a LoraConfig.
        UnsupportedLayerError: this release of peft does not accept other libraries' layers.
    """
    if not hasattr(LoraConfig, "_register_custom_module"):
        raise UnsupportedLayerError(
            f"peft {__version__} has no LoraConfig._register_custom_module, so it does not accept convlora's layers. "
            f"convlora.peft.register was tested with peft {SUPPORTED}; from_peft and to_peft work without it."
        )
    PEFT_TYPE_TO_CONFIG_MAPPING.setdefault(REGISTERED, ConvLoraConfig)
    _teach_peft()
    if lora_config is None or isinstance(lora_config, ConvLoraConfig):
        return lora_config
    if type(lora_config) is not LoraConfig:
        raise TargetError(f"{type(lora_config).__name__} is not a peft.LoraConfig. Nothing was changed.")
    taught = cast(Any, lora_config)
    taught.__class__ = ConvLoraConfig
    taught._teach()
    return lora_config


def _teach_peft() -> None:
    """Wrap, once, the functions of peft that support only peft's layer classes.

    The wrapped functions support convlora's layers, or raise an error with the reason. For peft's layers they do not
    change.
    """
    for owner, name, wrap in (
        (LoraModel, "add_weighted_adapter", _combining),
        (LoraModel, "_svd_generalized_task_arithmetic_weighted_adapter", _decomposing),
        (hotswap, "_pad_lora_weights", _padding),
    ):
        function = getattr(owner, name, None)
        if function is not None and not hasattr(function, "of_convlora"):
            wrapped: Any = functools.wraps(function)(wrap(function))
            wrapped.of_convlora = True
            setattr(owner, name, wrapped)


def _combining(combine: Any) -> Any:
    def refuses(model: nn.Module, adapters: list[str], *args: Any, **kwargs: Any) -> Any:
        for name, layer in model.named_modules():
            for adapter in adapters if isinstance(layer, ConvLoraLayer) else ():
                if layer.use_dora.get(adapter) or layer.lora_bias.get(adapter):
                    raise UnsupportedLayerError(
                        f"{name}: adapter {adapter!r} has DoRA's magnitudes or a bias of lora_B, which a combination "
                        "of factors cannot hold. Nothing was changed."
                    )
        return combine(model, adapters, *args, **kwargs)

    return refuses


class _AsMatrix:
    """The attributes of a layer that peft's decomposition reads, with ΔW as a matrix."""

    lora_embedding_A: Mapping[str, Tensor] = {}

    def __init__(self, layer: ConvLoraLayer) -> None:
        self.lora_A, self._layer = layer.lora_A, layer
        self.scaling = dict.fromkeys(layer.scaling, 1.0)  # older peft multiplies ΔW by the scaling once more

    def get_delta_weight(self, adapter: str) -> Tensor:
        return self._layer.get_delta_weight(adapter).flatten(1)


def _decomposing(decompose: Any) -> Any:
    def of_matrices(model: nn.Module, kind: str, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        adapters, weights, rank, layer, A, B, *rest = args
        if not isinstance(layer, ConvLoraLayer):
            return cast("tuple[Tensor, Tensor]", decompose(model, kind, *args, **kwargs))
        kept = min(rank, B.shape[0], A[0].numel())  # the number of singular values; the rest of the rank stays zero
        found = decompose(model, kind, adapters, weights, kept, _AsMatrix(layer), A, B, *rest, **kwargs)
        down, up = torch.zeros_like(A), torch.zeros_like(B)
        down[:kept], up[:, :kept] = found[0].view_as(down[:kept]), found[1].view_as(up[:, :kept])
        return down, up

    return of_matrices


def _padding(pad: Any) -> Any:
    def and_ours(model: nn.Module, target_rank: int) -> bool:
        layers = [module for module in model.modules() if isinstance(module, ConvLoraLayer)]
        for layer in layers:
            layer.pad(target_rank)
        return bool(pad(model, target_rank=target_rank)) or bool(layers)

    return and_ours


def from_peft(peft_model: PeftModel) -> nn.Module:
    """Turn a PeftModel into its base with the same adapters, under the same names, in convlora.

    >>> model = convlora.peft.from_peft(peft_model)      # predicts the same; the PeftModel is empty afterwards

    peft has frozen the base and has not stored which parameters were trainable before, so ``convlora.remove`` leaves
    the base frozen.

    Args:
        peft_model: the PeftModel, which is emptied.

    Returns:
        The base, the object that was given to ``get_peft_model``.

    Raises:
        TargetError: ``peft_model`` is not a PeftModel.
        StateError: it is merged or disabled, or several adapters are active.
        CheckpointError: an adapter would predict something else in convlora; every reason is named.

    Whatever is raised, the model is as it was.
    """
    if not isinstance(peft_model, PeftModel):
        raise TargetError(f"{type(peft_model).__name__} is not a peft.PeftModel. Nothing was changed.")
    active = list(peft_model.active_adapters)
    base: nn.Module = peft_model.get_base_model()
    _check_plain_state(base, active)
    every = {
        name: (
            _fields(base, name, config),
            get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False),
        )
        for name, config in peft_model.peft_config.items()
    }
    with _taken_off(base):
        check_model(base)
        check_plain(base)
        ready = {
            name: rebuild(from_peft_tensors(config, tensors, base, f"adapter {name!r}"), base, name)
            for name, (config, tensors) in every.items()
        }
        _install(base, {name: (m.plan, tensors, m) for name, (m, tensors) in ready.items()}, active[0])
        vars(base).pop("peft_config", None)
    return base


def _fields(base: nn.Module, adapter_name: str, config: PeftConfig) -> dict[str, Any]:
    """Return a configuration's fields, with patterns that name each layer with the value that peft gave it."""
    fields: dict[str, Any] = config.to_dict()
    fields["peft_type"] = str(getattr(fields["peft_type"], "value", fields["peft_type"]))
    for pattern, attributes in (("alpha_pattern", ("lora_alpha", "alpha")), ("rank_pattern", ("r",))):
        if fields.get(pattern):
            fields[pattern] = {
                f"^{re.escape(name)}$": getattr(module, attribute)[adapter_name]
                for name, module in base.named_modules()
                for attribute in attributes
                if isinstance(module, BaseTunerLayer) and adapter_name in getattr(module, attribute, ())
            }
    return fields


EveryAdapter = Mapping[str, tuple[Plan, dict[str, Tensor], Manifest]]


def _install(base: nn.Module, adapters: EveryAdapter, active: str) -> None:
    try:
        for plan, tensors, manifest in adapters.values():
            install(plan, tensors, manifest, base)
        set_adapter(base, active)
    except BaseException:
        if list(injections(base)):
            remove(base)
        raise


def _check_plain_state(base: nn.Module, active: list[str]) -> None:
    """Raise StateError unless the PeftModel is unmerged and enabled, with one active adapter."""
    if len(active) != 1:
        raise StateError(f"The PeftModel computes with {active}; call its set_adapter first. Nothing was changed.")
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise StateError(f"{name} is merged; call unmerge_adapter first. Nothing was changed.")
        if isinstance(module, BaseTunerLayer) and module.disable_adapters:
            raise StateError(f"{name}: its adapters are disabled; enable them first. Nothing was changed.")


@contextmanager
def _taken_off(base: nn.Module) -> Iterator[None]:
    """Replace peft's wrappers by the modules inside them; put them back if the block fails."""
    wrappers = [
        (parent, name, child)
        for parent in base.modules()
        for name, child in parent._modules.items()
        if isinstance(child, (BaseTunerLayer, ModulesToSaveWrapper))
    ]
    try:
        for parent, name, child in wrappers:
            is_layer = isinstance(child, BaseTunerLayer)
            parent._modules[name] = child.get_base_layer() if is_layer else child.original_module
        yield
    except BaseException:
        for parent, name, child in wrappers:
            parent._modules[name] = child
        raise


def to_peft(model: nn.Module) -> PeftModel:
    """Turn an injected model into a PeftModel of stock peft that predicts the same, with all adapters.

    >>> peft_model = convlora.peft.to_peft(model)        # the model is its base afterwards
    >>> peft_model.save_pretrained("tumour/")

    In training the two can differ: peft updates the running statistics of norm layers that convlora freezes.

    Args:
        model: an injected model, unmerged, with one active adapter.

    Returns:
        The PeftModel around the base.

    Raises:
        UnsupportedLayerError: stock peft would predict something else; each layer is named with the reason.
        StateError: there is no adapter; the model is merged; several adapters are active; or a ``disable_adapter`` or
            ``scaled`` block is open.

    Whatever is raised, the model is as it was.
    """
    root, injection = ready_alone(model, check_unmerged, check_enabled, check_single)
    active = injection.active
    every, configs, faults, kinds = {}, {}, [], set()
    for name, adapter in injection.adapters.items():
        adapter.follow()
        tensors, buffers = adapter_tensors(root, injection, adapter)
        every[name] = (adapter.plan, tensors, Manifest(Path(name), adapter.plan, {}, {}, buffers, {}))
        configs[name] = {**peft_config(root, adapter), "inference_mode": False}
        kinds.add(peft_type(root, adapter))
        faults += [*faults_for_any_peft(root, adapter), *faults_for_stock_peft(adapter)]
        faults += [f"{key}: a buffer that changed, and peft has one for all" for key in buffers if len(configs) > 1]
    if faults:
        registered = (
            "Save it with convlora.save_adapter and load it in peft after convlora.peft.register(), or merge it."
        )
        remedy = "Merge the adapter to pass on the network." if ALONE in kinds else registered
        lines = ["Stock peft would not predict the same:", *(f"  {fault}" for fault in dict.fromkeys(faults))]
        raise UnsupportedLayerError("\n".join([*lines, f"{remedy} Nothing was changed."]))
    training = root.training
    remove(root)
    try:
        own = {name: _without_biases(plan, tensors) for name, (plan, tensors, _) in every.items()}
        return _in_peft(root, configs, own, active, training)
    except BaseException:
        with _taken_off(root):
            vars(root).pop("peft_config", None)
            _install(root, every, active)
        raise


def _without_biases(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without biases: peft computes them itself, and others were refused before."""
    biases = {dotted(name, "bias") for name in plan.biases}
    return {key: tensor for key, tensor in tensors.items() if key not in biases}


def _in_peft(
    root: nn.Module, configs: Mapping[str, Any], every: Mapping[str, Mapping[str, Tensor]], active: str, training: bool
) -> PeftModel:
    peft_model = get_peft_model(root, get_peft_config(configs[active]), adapter_name=active)
    for name, config in configs.items():
        if name != active:
            peft_model.add_adapter(name, get_peft_config(config))
    for name, tensors in every.items():
        keys = {dotted(PREFIX[:-1], key): tensor for key, tensor in tensors.items()}
        strange = set_peft_model_state_dict(peft_model, keys, adapter_name=name).unexpected_keys
        if strange:
            raise UnsupportedLayerError(f"peft {__version__} does not load {strange[0]}. Nothing was changed.")
    peft_model.set_adapter(active)
    return peft_model.train(training)
