"""convlora's convolution as a layer of Hugging Face peft. This file imports peft; only :mod:`convlora.peft` imports it.

The layer has peft's interface (``lora_A`` and ``lora_B`` by adapter name, merge, unmerge, per-sample adapters) and
computes like an injected layer: the base layer's own forward with W + ΔW, and gradients through tensors of rank r. With
DoRA the weight is c ⊙ (W + ΔW), c = m / ‖W + ΔW‖ for each output channel. With ``lora_bias``, scaling · lora_B.bias is
added to the bias. Several active adapters apply one after the other, as in peft: V ← c ⊙ (V + ΔW), with c from the
base's W.
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

from ._checkpoint.likeness import is_faithful, is_torchs_own, unlike_geometry
from ._layer.computed import has_parameter
from ._layer.dora import channel_norms, channel_scale, scaled_output, scaled_weight
from ._layer.fast import convolution, is_plain
from ._layer.functional import delta_weight, effective_weight, is_tracing, no_autocast, scaling_of
from ._layer.kept import Kept
from .errors import UnsupportedLayerError

try:
    from peft.utils.warning import PeftWarning
except ImportError:  # before 0.17
    PeftWarning = UserWarning


class Factor(nn.Module):
    """A factor in the form of a layer, as peft expects it: a module with a ``weight`` and optionally a ``bias``."""

    handed_out = 0
    """How often other code read ``weight``; it may then write through .data, as peft's hotswap_adapter does."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    @staticmethod
    def drawn(shape: Sequence[int], biases: int = 0) -> Factor:
        """Return a factor with the random initialisation of torch's convolutions."""
        factor = Factor(torch.empty(*shape), torch.empty(biases) if biases else None)
        nn.init.kaiming_uniform_(factor.tensor(), a=math.sqrt(5))
        if biases:
            nn.init.uniform_(cast(Tensor, factor.bias), -1 / math.sqrt(shape[1]), 1 / math.sqrt(shape[1]))
        return factor

    def tensor(self) -> Tensor:
        """Return ``weight`` without counting the read, for convlora's own code, which does not write to it."""
        own = self._parameters.get("weight")
        return cast(Tensor, self.weight) if own is None else own

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            self.handed_out += 1
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        """Return the shape, which ``print(model)`` shows."""
        return str(tuple(self.tensor().shape))


class Magnitudes(Factor):
    """DoRA's magnitudes, in the dtype of the factors.

    For a half-precision base peft makes adapters in half precision and then casts them to fp32. Magnitudes that are
    unchanged since then are replaced by the norms in fp32 at the first forward: a fresh adapter's scale is exactly 1.
    """

    def __init__(self, norms: Tensor, dtype: torch.dtype) -> None:
        super().__init__(norms.to(dtype))
        self._norms = None if dtype == norms.dtype or norms.is_meta else norms

    def tensor(self) -> Tensor:
        weight, norms = super().tensor(), self._norms
        if norms is not None and not torch.compiler.is_compiling():
            self._norms = None
            halves = (torch.float16, torch.bfloat16) if weight.dtype == norms.dtype else ()
            if any(torch.equal(weight.cpu(), norms.to(half).to(norms.dtype).cpu()) for half in halves):
                weight.data.copy_(norms)
        return weight


def differs_from_stock(layer: nn.Module, use_dora: bool = False) -> bool:
    """Return whether stock peft's layer for this convolution would predict something else than convlora's."""
    is_same = is_torchs_own if use_dora else is_faithful
    return not is_same(type(layer)) or bool(unlike_geometry(layer))


class ConvLoraLayer(nn.Module, LoraLayer):  # type: ignore[misc]
    """A convolution of any dimension, geometry and subclass with peft adapters.

    Shapes for a 2-D convolution: ``lora_A.<name>.weight`` ``(rank, C_in / groups, kH, kW)``; ``lora_B.<name>.weight``
    ``(C_out, rank, 1, 1)``; with DoRA, ``lora_magnitude_vector.<name>.weight`` ``(1, C_out, 1, 1)``; with
    ``lora_bias``, ``lora_B.<name>.bias`` ``(C_out,)``. They are peft's shapes, except for grouped convolutions.
    """

    # attributes of peft's class, whose types mypy does not see
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
    lora_magnitude_vector: Any
    adapter_layer_names: tuple[str, ...]
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
            warnings.simplefilter("ignore")  # peft warns that it cannot read the channels of transposed convolutions
            LoraLayer.__init__(self, base_layer)
        layer = cast(_ConvNd, self.get_base_layer())
        self.in_features, self.out_features = layer.in_channels, layer.out_channels
        self._active_adapter = adapter_name
        self._kept = Kept()
        self._own: dict[str, Tensor] = {}
        if not has_parameter(layer):
            raise UnsupportedLayerError(
                f"{kwargs.get('target_name') or type(layer).__name__}: its weight is computed from other parameters "
                "(weight_norm, say), into which peft cannot merge. Use convlora.inject."
            )
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: Any = None, **kwargs: Any) -> None:
        """Add an adapter; peft 0.15 passes the fields of its configuration, later releases the configuration."""

        def option(name: str, default: Any) -> Any:
            return kwargs[name] if name in kwargs else getattr(config, name, default)

        if r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {r}")
        layer = self.get_base_layer()
        use_dora, lora_bias = option("use_dora", False), option("lora_bias", False)
        if lora_bias and layer.bias is None:
            warnings.warn(
                f"`lora_bias=True` was passed but the targeted layer of type {type(layer).__name__} has no bias. "
                "lora_B's is added to its output, and cannot be merged.",
                PeftWarning,
                stacklevel=2,
            )
        if config is not None and hasattr(self, "resolve_lora_variant"):
            self.resolve_lora_variant(config=config)  # raises peft's error for an unsupported variant of LoRA
        dropout, use_rslora = option("lora_dropout", 0.0), option("use_rslora", False)
        if dropout and not is_plain(layer, type(layer)):
            raise UnsupportedLayerError(
                f"{kwargs.get('target_name') or 'A layer'}: lora_dropout needs the plain forward of a torch "
                f"convolution, and this is a {type(layer).__name__}. Use lora_dropout=0 or exclude_modules."
            )
        if hasattr(config, "built"):
            config.built(layer)
        elif config is not None and differs_from_stock(layer, use_dora):
            raise UnsupportedLayerError(
                f"Adapter {adapter_name!r}: this model has convlora's layers, and the file that peft would save "
                "predicts something else in stock peft. Pass its LoraConfig through convlora.peft.register first."
            )
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = scaling_of(lora_alpha, r, use_rslora)
        self.lora_bias[adapter_name], self.use_dora[adapter_name] = lora_bias, use_dora
        if hasattr(self, "use_rslora"):
            self.use_rslora[adapter_name] = use_rslora
        self.lora_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        shape = layer.weight.shape
        self.lora_A[adapter_name] = Factor.drawn((r, *shape[1:]))
        biases = layer.out_channels if lora_bias else 0
        self.lora_B[adapter_name] = Factor.drawn((shape[0], r, *[1] * len(shape[2:])), biases)
        if option("init_lora_weights", True):
            self.reset_lora_parameters(adapter_name, option("init_lora_weights", True))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if use_dora:
            self._give_magnitudes(adapter_name)
        inference = {"inference_mode": True} if option("inference_mode", False) else {}
        self.set_adapter(self.active_adapters, **inference)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """The variants of LoRA that this layer supports by itself: DoRA."""
        return {(): None, ("use_dora",): None}

    @torch.no_grad()
    def _give_magnitudes(self, name: str) -> None:
        if "lora_magnitude_vector" not in self.adapter_layer_names:  # older peft adds it only for its own DoRA layers
            self.adapter_layer_names = (*self.adapter_layer_names, "lora_magnitude_vector")
        weight, (A, B, scaling) = self._base_weight(), self._factors([name])
        wide = weight.to(A.device, torch.promote_types(weight.dtype, torch.float32))
        norms = channel_norms(effective_weight(wide, A.to(wide.dtype), B.to(wide.dtype), scaling), self._groups)
        self.lora_magnitude_vector[name] = Magnitudes(norms.view(1, -1, *[1] * len(weight.shape[2:])), A.dtype)

    def _base_weight(self) -> Tensor:
        """Return W, also while merged."""
        return self._own["weight"] if self._own else cast(Tensor, self.get_base_layer()._parameters["weight"])

    @property
    def _groups(self) -> int:
        """The groups of a transposed convolution; 0 for all others, as DoRA's norms expect it."""
        layer = self.get_base_layer()
        return cast(int, layer.groups) if layer.transposed else 0

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return an adapter's ΔW in the shape of the base layer's weight; with DoRA, without the magnitudes."""
        A, B, scaling = self._factors([adapter])
        return delta_weight(A, B.flatten(1), scaling)

    def pad(self, rank: int) -> None:
        """Pad every adapter's factors with zeros to this rank, so that compiled code fits adapters of other ranks.

        Raises:
            ValueError: an adapter has a higher rank.
        """
        if (largest := max(factor.tensor().shape[0] for factor in self.lora_A.values())) > rank:
            raise ValueError(
                f"An adapter has rank {largest}, which cannot be padded to {rank}. Use target_rank={largest}."
            )
        for store, dim in ((self.lora_A, 0), (self.lora_B, 1)):
            for factor in store.values():
                weight = factor.tensor()
                zeros = weight.new_zeros([*weight.shape[:dim], rank - weight.shape[dim], *weight.shape[dim + 1 :]])
                padded = torch.cat([weight.detach(), zeros], dim)
                factor.weight = nn.Parameter(padded, requires_grad=weight.requires_grad)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the base's weight (and bias) by those that the unmerged layer computes with; the base's are kept."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.lora_A]
        if not names:
            return
        layer = self.get_base_layer()
        if layer.bias is None and any(self.lora_bias[name] for name in names):
            raise RuntimeError(  # as peft does
                "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias. Leave it "
                "unmerged, or train without lora_bias."
            )
        own = self._own or {"weight": layer.weight.data}
        every = [*self.merged_adapters, *names]
        with torch.no_grad():
            merged = {"weight": self._changed(own["weight"], every)}
            if (extra := self._extra_bias(own["weight"], every)) is not None:
                own = {"bias": layer.bias.data} | own
                merged["bias"] = _sum(own["bias"], extra)
        if safe_merge and not all(torch.isfinite(tensor).all() for tensor in merged.values()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken")
        self._own = own
        for key, tensor in merged.items():
            getattr(layer, key).data = tensor
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restore W and the bias bit for bit."""
        if not self._own:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        layer = self.get_base_layer()
        for key, tensor in self._own.items():
            now = getattr(layer, key)
            now.data = tensor.to(now.device, now.dtype)
        self._own = {}
        self.merged_adapters.clear()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer's own forward with the active adapters' change added to its weight."""
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
            return self._forward_with_dropout(names, x, layer._parameters["weight"])
        weight = layer._parameters["weight"]
        extra = self._extra_bias(weight, names)
        if torch.is_grad_enabled():
            y = self._forward_in_training(names, x, weight, is_direct)
            if y is not None:
                return self._plus(y, extra)
        changed, bias = self._weight(weight, names), layer.bias
        if extra is not None and bias is not None:  # summed as merging does
            bias, extra = _sum(bias, extra), None
        if is_direct:
            y = layer._conv_forward(x, changed, bias)
        else:
            swapped = {"weight": changed} if bias is layer.bias else {"weight": changed, "bias": bias}
            y = functional_call(layer, swapped, (x, *args), kwargs)
        return self._plus(y, extra)

    def _forward_in_training(self, names: Sequence[str], x: Tensor, weight: Tensor, is_direct: bool) -> Tensor | None:
        """Run the forward with convlora's autograd, without lora_B's bias; return None if it does not apply."""
        A, B, scaling = self._factors(names)
        magnitudes = [self.lora_magnitude_vector[name].tensor() for name in names if name in self.lora_magnitude_vector]
        if any(tensor.requires_grad for tensor in (A, B, weight, *magnitudes)):
            self._kept.train()
        if not is_direct or (magnitudes and len(names) > 1):
            return None
        y = convolution(self.get_base_layer(), x, weight, A, B.flatten(1), scaling, "auto")
        return self._scaled(y, self._scale(weight, names[0])) if magnitudes and y is not None else y

    def _forward_with_dropout(self, names: Sequence[str], x: Tensor, weight: Tensor) -> Tensor:
        y = self.base_layer(x)
        for name in names:
            delta, extra = self.get_delta_weight(name), self._extra_bias(weight, [name])
            p, scale = cast(float, getattr(self.lora_dropout[name], "p", 0.0)), self._scale(weight, name)
            if scale is not None and p:  # as in peft, dropout also applies to DoRA's change of the base's output
                wide = weight.to(delta.dtype)
                delta = scaled_weight(wide + delta, scale, self._groups) - wide
            branch = self.get_base_layer()._conv_forward(F.dropout(x, p), delta.to(x.dtype), None)
            y = self._plus(y + branch, extra)
            if scale is not None and not p:
                y = self._scaled(y, scale)
        return cast(Tensor, y)

    def _scaled(self, y: Tensor, scale: Tensor | None) -> Tensor:
        layer = self.get_base_layer()
        return scaled_output(y, cast(Tensor, scale), layer.bias, -1 - len(layer.kernel_size))

    def _plus(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output plus a bias for each channel."""
        return y if bias is None else y + bias.to(y.dtype).view(-1, *[1] * len(self.get_base_layer().kernel_size))

    def _scale(self, base: Tensor, name: str) -> Tensor | None:
        """Return an adapter's c of shape ``(C_out,)`` with DoRA, and None without."""
        if name not in self.lora_magnitude_vector:
            return None
        A, B, scaling = self._factors([name])
        with no_autocast(base.device.type):
            with torch.no_grad():
                changed = effective_weight(base.to(torch.promote_types(base.dtype, A.dtype)), A, B, scaling)
            return channel_scale(self.lora_magnitude_vector[name].tensor().flatten(), changed, self._groups)

    def _changed(self, base: Tensor, names: Sequence[str]) -> Tensor:
        """Return the weight that adapters make of W, in W's dtype, rounded once."""
        if not any(name in self.lora_magnitude_vector for name in names):
            return effective_weight(base, *self._factors(names))
        with no_autocast(base.device.type):
            now = base.to(torch.promote_types(base.dtype, self.lora_A[names[0]].tensor().dtype))
            for name in names:
                now, scale = effective_weight(now, *self._factors([name])), self._scale(base, name)
                if scale is not None:
                    now = scaled_weight(now, scale, self._groups)
            return now.to(base.dtype)

    def _extra_bias(self, base: Tensor, names: Sequence[str]) -> Tensor | None:
        """Return the sum of lora_B's biases for each output channel; None if no adapter has one."""
        extra: Tensor | None = None
        for name in names:
            if (bias := self.lora_B[name].bias) is not None:
                extra = self.scaling[name] * bias + (0 if extra is None else extra)
            if extra is not None and (scale := self._scale(base, name)) is not None:
                extra = extra * scale
        return extra

    def _factors(self, names: Sequence[str]) -> tuple[Tensor, Tensor, float]:
        """Return lora_A, lora_B and scaling of one adapter, or of the sum of several."""
        if len(names) == 1:
            return self.lora_A[names[0]].tensor(), self.lora_B[names[0]].tensor(), self.scaling[names[0]]
        A = torch.cat([self.lora_A[name].tensor() for name in names])
        return A, torch.cat([self.scaling[name] * self.lora_B[name].tensor() for name in names], dim=1), 1.0

    def _weight(self, weight: Tensor, names: Sequence[str]) -> Tensor:
        if torch.compiler.is_compiling() or is_tracing():
            return self._changed(weight, names)
        stores = (self.lora_A, self.lora_B, self.lora_magnitude_vector)
        factors = [store[name] for name in names for store in stores if name in store]
        # A scaling is a tensor after peft's prepare_model_for_compiled_hotswap, which lets it be written in place.
        scalings: list[Any] = [self.scaling[name] for name in names]
        written = [scaling for scaling in scalings if isinstance(scaling, Tensor)]
        numbers = tuple(scaling for scaling in scalings if not isinstance(scaling, Tensor))
        told = (*numbers, *(factor.handed_out for factor in factors))
        return self._kept.weight(
            weight, (*(factor.tensor() for factor in factors), *written), told, lambda base: self._changed(base, names)
        )

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._kept.clear()
        return cast(Any, super())._apply(*args, **kwargs)

    def __repr__(self) -> str:
        return "convlora." + super().__repr__()


def _sum(bias: Tensor, extra: Tensor) -> Tensor:
    """Return the sum of two biases in the first one's dtype, rounded once."""
    return (bias + extra).to(bias.dtype)
