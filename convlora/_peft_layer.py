"""convlora's convolution as a layer of Hugging Face peft; only :mod:`convlora.peft` imports this, and with it peft.

It keeps peft's contract (``lora_A`` and ``lora_B`` by adapter name, merge, unmerge, per-sample adapters) and computes
as an injected layer does: the base layer's own forward with W + ΔW, gradients through tensors of rank r.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from ._checkpoint.likeness import is_faithful, unlike_geometry
from ._layer.computed import has_parameter
from ._layer.fast import convolution, is_plain
from ._layer.functional import delta_weight, effective_weight, is_tracing, scaling_of
from ._layer.kept import Kept
from .errors import UnsupportedLayerError


class Factor(nn.Module):
    """A factor where peft expects a layer: a module with a ``weight``, filled as torch fills a convolution's."""

    handed_out = 0
    """How often other code asked for the ``weight``: it may write through .data, as peft's hotswap_adapter does."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def tensor(self) -> Tensor:
        """The ``weight``, for convlora, which does not write to it."""
        own = self._parameters.get("weight")
        return cast(Tensor, self.weight) if own is None else own

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            self.handed_out += 1
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        """The line that ``print(model)`` shows."""
        return str(tuple(self.tensor().shape))


def differs_from_stock(layer: nn.Module) -> bool:
    """Whether stock peft's layer for this convolution would predict another thing than convlora's."""
    return not is_faithful(type(layer)) or bool(unlike_geometry(layer))


class ConvLoraLayer(nn.Module, LoraLayer):  # type: ignore[misc]
    """A convolution of any dimension, geometry and subclass with peft adapters.

    ``lora_A.<name>.weight`` is ``(rank, C_in / groups, kH, kW)`` and ``lora_B.<name>.weight`` ``(C_out, rank, 1, 1)``:
    what peft has, too, where the convolution is not grouped.
    """

    # peft's, whose types mypy does not see
    get_base_layer: Any
    set_adapter: Any
    reset_lora_parameters: Any
    resolve_lora_variant: Any
    _move_adapter_to_device_of_base_layer: Any
    _check_forward_args: Any
    base_layer: Any
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_bias: dict[str, bool]
    use_dora: dict[str, bool]
    use_rslora: dict[str, bool]
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    merged: bool
    disable_adapters: bool
    active_adapters: list[str]
    merged_adapters: list[str]

    def __init__(self, base_layer: nn.Module, adapter_name: str, r: int, lora_alpha: float, **kwargs: Any) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that peft does not know the features of transposed convolutions
            LoraLayer.__init__(self, base_layer)
        layer = cast(_ConvNd, self.get_base_layer())
        self.in_features, self.out_features = layer.in_channels, layer.out_channels
        self._active_adapter = adapter_name
        self._kept = Kept()
        self._own: Tensor | None = None
        if not has_parameter(layer):
            raise UnsupportedLayerError(
                f"{kwargs.get('target_name') or type(layer).__name__}: its weight is computed from others "
                "(weight_norm, say), which does not go with peft's way of merging. Use convlora.inject."
            )
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: Any = None, **kwargs: Any) -> None:
        """Add an adapter; peft 0.15 gives the fields of its configuration one by one, later ones the whole."""

        def option(name: str, default: Any) -> Any:
            return kwargs[name] if name in kwargs else getattr(config, name, default)

        if r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {r}")
        layer = self.get_base_layer()
        for name in ("use_dora", "lora_bias"):
            if option(name, False):
                raise UnsupportedLayerError(f"{name}=True is not served by convlora's layers in peft.")
        if config is not None and hasattr(self, "resolve_lora_variant"):
            self.resolve_lora_variant(config=config)  # peft's own error for a variant of LoRA that is not served
        dropout, use_rslora = option("lora_dropout", 0.0), option("use_rslora", False)
        if dropout and not is_plain(layer, type(layer)):
            raise UnsupportedLayerError(
                f"{kwargs.get('target_name') or 'A layer'}: lora_dropout needs the plain forward of a torch "
                f"convolution, and this is a {type(layer).__name__}. Use lora_dropout=0 or exclude_modules."
            )
        if hasattr(config, "built"):
            config.built(layer)
        elif config is not None and differs_from_stock(layer):
            raise UnsupportedLayerError(
                f"Adapter {adapter_name!r}: this model has convlora's layers, and what peft would save of them "
                "predicts another thing in stock peft. Pass its LoraConfig through convlora.peft.register first."
            )
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = scaling_of(lora_alpha, r, use_rslora)
        self.lora_bias[adapter_name] = self.use_dora[adapter_name] = False
        if hasattr(self, "use_rslora"):
            self.use_rslora[adapter_name] = use_rslora
        self.lora_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        shape = layer.weight.shape
        self.lora_A[adapter_name] = Factor((r, *shape[1:]))
        self.lora_B[adapter_name] = Factor((shape[0], r, *[1] * len(shape[2:])))
        if option("init_lora_weights", True):
            self.reset_lora_parameters(adapter_name, option("init_lora_weights", True))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        inference = {"inference_mode": True} if option("inference_mode", False) else {}
        self.set_adapter(self.active_adapters, **inference)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of an adapter, shaped like the base layer's weight."""
        A, B, scaling = self._factors([adapter])
        return delta_weight(A, B.flatten(1), scaling)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put W + ΔW in the weight's place, the same as the unmerged layer computes with; W is kept aside."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.lora_A]
        if not names:
            return
        weight = self.get_base_layer().weight
        own = weight.data if self._own is None else self._own
        with torch.no_grad():
            merged = effective_weight(own, *self._factors([*self.merged_adapters, *names]))
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken")
        self._own, weight.data = own, merged
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put W back, bit for bit."""
        if self._own is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self.get_base_layer().weight
        weight.data, self._own = self._own.to(weight.device, weight.dtype), None
        self.merged_adapters.clear()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's own forward with the active adapters' change added to its weight."""
        self._check_forward_args(x, *args, **kwargs)
        names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        if names is not None:
            return self._forward_by_sample(x, names, *args, **kwargs)
        return self._forward_with([] if self.merged else self.active_adapters, x, *args, **kwargs)

    def _forward_by_sample(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        groups = {name: [i for i, other in enumerate(names) if other == name] for name in names}
        parts = [self._forward_with([name], x[rows], *args, **kwargs) for name, rows in groups.items()]
        order = torch.tensor([row for rows in groups.values() for row in rows], device=x.device)
        return torch.cat(parts)[order.argsort()]

    def _forward_with(self, names: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in names if name in self.lora_A]
        layer = self.get_base_layer()
        if not names:
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        is_direct = is_plain(layer, type(layer)) and not (
            args or kwargs or layer._forward_hooks or layer._forward_pre_hooks
        )
        if self.training and any(isinstance(self.lora_dropout[name], nn.Dropout) for name in names):
            return self._forward_with_dropout(names, x)
        weight = layer._parameters["weight"]
        if torch.is_grad_enabled():
            A, B, scaling = self._factors(names)
            if A.requires_grad or B.requires_grad or weight.requires_grad:
                self._kept.train()
            y = convolution(layer, x, weight, A, B.flatten(1), scaling, "auto") if is_direct else None
            if y is not None:
                return y
        changed = self._weight(weight, names)
        if is_direct:
            return cast(Tensor, layer._conv_forward(x, changed, layer.bias))
        return cast(Tensor, functional_call(layer, {"weight": changed}, (x, *args), kwargs))

    def _forward_with_dropout(self, names: Sequence[str], x: Tensor) -> Tensor:
        layer = self.get_base_layer()
        y = self.base_layer(x)
        for name in names:
            dropped = F.dropout(x, cast(float, getattr(self.lora_dropout[name], "p", 0.0)))
            y = y + layer._conv_forward(dropped, self.get_delta_weight(name).to(x.dtype), None)
        return cast(Tensor, y)

    def _factors(self, names: Sequence[str]) -> tuple[Tensor, Tensor, float]:
        """lora_A, lora_B and scaling of one adapter; of several, those of their sum."""
        if len(names) == 1:
            return self.lora_A[names[0]].tensor(), self.lora_B[names[0]].tensor(), self.scaling[names[0]]
        A = torch.cat([self.lora_A[name].tensor() for name in names])
        return A, torch.cat([self.scaling[name] * self.lora_B[name].tensor() for name in names], dim=1), 1.0

    def _weight(self, weight: Tensor, names: Sequence[str]) -> Tensor:
        def compute(base: Tensor) -> Tensor:
            return effective_weight(base, *self._factors(names))

        if torch.compiler.is_compiling() or is_tracing():
            return compute(weight)
        factors = [factor[name] for name in names for factor in (self.lora_A, self.lora_B)]
        # Tensors where peft's hotswap_adapter is to write them in place.
        scalings: list[Any] = [self.scaling[name] for name in names]
        written = [scaling for scaling in scalings if isinstance(scaling, Tensor)]
        numbers = tuple(scaling for scaling in scalings if not isinstance(scaling, Tensor))
        told = (*numbers, *(factor.handed_out for factor in factors))
        return self._kept.weight(weight, (*(factor.tensor() for factor in factors), *written), told, compute)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._kept.clear()
        return cast(Any, super())._apply(*args, **kwargs)

    def __repr__(self) -> str:
        return "convlora." + super().__repr__()
