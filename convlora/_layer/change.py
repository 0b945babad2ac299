"""The change that one adapter makes to one layer's weight: all that is common to every method.

A method is a class of changes, and each is one file of ``_methods/``. It says which tensors it trains, how they begin
and what it makes of the base's weight; the rest of the library knows it by :class:`Change` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .dora import channel_scale, scaled_output, scaled_weight
from .functional import Factors, has_channels_last, in_dtype, no_autocast
from .kept import Scaling
from .paths import TrainingPath

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Option = bool | int | float | str


class Change(nn.Module):
    """One layer's change by one method. A method of your own overrides what has no answer here:

    - ``method``, its name, and ``formula``, what it makes of W, for people;
    - :meth:`shapes`, its trained tensors for a weight's shape and a rank;
    - :meth:`begin`, which fills them so that the base is unchanged to the bit, and :meth:`is_fresh`;
    - :meth:`changed`, the new weight of a base weight.

    A change ΔW = scaling · B @ A may offer :meth:`factors`. That opens to it training through tensors of rank r,
    batches for several adapters in one pass, :func:`convlora.shrink`, :func:`convlora.combine_adapters`, and peft's
    LoRA files.

    Attributes:
        weight_shape: ``(C_out, C_in / groups, kH, kW)`` or ``(out_features, in_features)``; the base's weight has as
            many numbers.
        scaling: the factor of the change; alpha / rank, or alpha / √rank with rsLoRA, in methods that have an alpha.
        strength: the share of the change that is applied, W + strength · (W' − W); see :func:`convlora.set_scale`.
        dropout: probability with which the inputs of the change are zeroed in training.
        training_path: how a convolution with factors computes in training; see ``paths.py``.
        groups: of a transposed convolution, which keeps ``(C_in, C_out / groups, kH, kW)``; 0 for every other layer.
        lora_magnitude: only with DoRA: ``(C_out,)``, the magnitude of each output channel's weight.
    """

    method: ClassVar[str]
    formula: ClassVar[str]
    fresh: ClassVar[str] = "factor is as it began"
    """The words by which a warning describes an untrained layer."""
    inits: ClassVar[tuple[str, ...]] = ("kaiming",)
    """The initialisations that the method has."""
    has_rank: ClassVar[bool] = True
    """Whether its number of parameters depends on a rank."""
    has_alpha: ClassVar[bool] = True
    """Whether ``scaling`` comes from an alpha. Otherwise it is 1; any other value interpolates from W to W'."""
    defaults: ClassVar[Mapping[str, Option]] = {}
    """The method's options (``method_options``) and their default values."""
    by_channel: ClassVar[bool] = False
    """Whether :meth:`shapes` also gets the layout of the channels: ``groups`` and ``transposed``."""
    trains_bias: ClassVar[bool] = False
    """Whether the layer's own bias, where it has one, is trained and belongs to the adapter."""
    fast: ClassVar[tuple[str, ...]] = ()
    """Tensors that may learn at a higher rate, see :func:`convlora.parameter_groups`. As LoRA's B, they begin at zero,
    the others' gradient is zero until they move, and they read what the others make of the layer's input."""
    ranks: ClassVar[str] = ""
    """The reason why :meth:`rank_at` may return less than the rank that is asked for."""
    use_dora: bool = False

    def __init__(
        self,
        weight_shape: Shape,
        like: Tensor,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        training_path: TrainingPath = "auto",
        *,
        groups: int = 1,
        transposed: bool = False,
        **options: Option,
    ) -> None:
        super().__init__()
        # fp32 also on half-precision bases: in bf16, updates of 1e-4 are rounded away.
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.weight_shape = tuple(weight_shape)
        self.rank = rank
        self.options = {**self.defaults, **options}
        self.scaling = scaling
        self.strength = 1.0
        self.dropout = dropout
        self.training_path: TrainingPath = training_path
        self.groups = groups if transposed else 0
        asked: dict[str, Any] = {**options}
        if self.by_channel:
            asked |= {"groups": groups, "transposed": transposed}
        trained, constant = (
            self.shapes(self.weight_shape, rank, **asked),
            self.constants(self.weight_shape, rank, **asked),
        )
        self.names: tuple[str, ...] = (*trained, *constant)
        for name, shape in trained.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=dtype, device=like.device)))
        for name, shape in constant.items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=like.device))
        self.begin()

    # ---- what a method says

    @classmethod
    def shapes(cls, weight: Shape, rank: int, **options: Any) -> Shapes:
        """Return the shapes of the trained tensors by name.

        Raises:
            TargetError: there is no such change of a weight of this shape; the layer's name is put before.
        """
        raise NotImplementedError

    @classmethod
    def rank_at(cls, weight: Shape, rank: int, **options: Any) -> int:
        """Return the largest rank up to this one that the method has for this weight, or 0."""
        return rank

    @classmethod
    def idle_in(cls, layer: nn.Module, **options: Any) -> str:
        """Return the reason why the method would not change this layer's output; empty if it would."""
        return ""

    @classmethod
    def constants(cls, weight: Shape, rank: int, **options: Any) -> Shapes:
        """Return the shapes, by name, of tensors that belong to the adapter and are not trained."""
        return {}

    def begin(self) -> None:
        """Initialise the tensors, which are zeros, so that the new weight equals the base's bit for bit."""
        raise NotImplementedError

    def is_fresh(self) -> bool:
        """Return whether the tensors still change nothing."""
        raise NotImplementedError

    def changed(self, weight: Tensor) -> Tensor:
        """Compute the new weight from the base's, given in ``weight_shape`` and in the wider of both dtypes."""
        raise NotImplementedError

    def factors(self) -> Factors | None:
        """A ``(rank, *weight_shape[1:])`` and B ``(C_out, rank)`` where the change is scaling · B @ A; else None.

        r is ``rank``, or 2 · ``rank`` for the anchored LoRA of PiSSA and OLoRA.
        """
        return None

    def factors_at(self, base: Tensor) -> Factors | None:
        """As :meth:`factors`, in training only, for a change whose factors depend on the base's weight."""
        return self.factors()

    def output(self, x: Tensor, bias: Tensor | None, compute: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Compute a plain layer's output in training without a weight gradient; None for autograd through the weight.

        Args:
            x: the input.
            bias: the layer's.
            compute: the base's own forward, with that bias.
        """
        return None

    @classmethod
    def stored_shapes(cls, weight: Shape, rank: int, **options: Any) -> Shapes:
        """Return the shapes in a file, by the part of the key after the layer's name."""
        return cls.shapes(weight, rank, **options) | cls.constants(weight, rank, **options)

    def stored(self) -> Mapping[str, Tensor]:
        """Return the tensors as a file contains them, by the names of :meth:`stored_shapes`."""
        return {name: getattr(self, name) for name in self.names}

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """Load the tensors that :meth:`stored` returned."""
        for name in self.names:
            getattr(self, name).copy_(stored[name])

    # ---- what follows from it

    def effective_weight(self, base: Tensor) -> Tensor:
        """Compute the weight that replaces the base's, in the base's dtype, shape and memory format."""
        with no_autocast(base.device.type):
            changed = self._strengthened(self._wide(base))
            if self.use_dora:
                scale = channel_scale(self.lora_magnitude, changed, self.groups)
                changed = scaled_weight(changed, scale, self.groups)
            return self._narrow(changed, base)

    @staticmethod
    def _narrow(changed: Tensor, base: Tensor) -> Tensor:
        """A new weight as the layer has it: in the base's dtype, shape and memory format."""
        return _like(_shaped(in_dtype(changed, base.dtype), base.shape), base)

    def delta(self, base: Tensor) -> Tensor:
        """Compute ΔW for this base weight; with DoRA, before the magnitudes."""
        weight = self._wide(base)
        return _shaped(self._strengthened(weight) - weight, base.shape)

    def _strengthened(self, weight: Tensor) -> Tensor:
        """Compute the new weight; without an alpha, ``scaling`` interpolates from W to it."""
        changed = self.changed(weight)
        return changed if self.has_alpha or self.scaling == 1 else torch.lerp(weight, changed, self.scaling)

    def _wide(self, base: Tensor) -> Tensor:
        self.run_hooks()
        return _shaped(in_dtype(base, torch.promote_types(base.dtype, self.own_dtype())), self.weight_shape)

    def scaled_output(self, layer: nn.Module, y: Tensor, base: Tensor) -> Tensor:
        """Apply DoRA's magnitudes to an output that was computed without them."""
        with no_autocast(base.device.type):
            with torch.no_grad():
                changed = self._strengthened(self._wide(base))
            scale = channel_scale(self.lora_magnitude, changed, 0)
        return scaled_output(y, scale, cast("Tensor | None", layer.bias), -1 if isinstance(layer, nn.Linear) else 1)

    def give_magnitudes(self, norms: Tensor) -> None:
        """Turn the change into DoRA, with these magnitudes of the output channels."""
        self.use_dora = True
        self.lora_magnitude = nn.Parameter(norms)

    @property
    def numbers(self) -> Scaling:
        """All that the effective weight depends on apart from tensors."""
        return self.scaling

    @property
    def parts(self) -> tuple[tuple[Change, float], ...]:
        """Itself, in full; see ``mix.py``."""
        return ((self, 1.0),)

    def sources(self) -> tuple[Tensor, ...] | None:
        """Return all tensors, apart from the base's, from which the effective weight is computed.

        None if one of them is itself computed (``parametrize``, pruning), by code that may read anything.
        """
        if self._modules or (self._forward_pre_hooks and any(self._writing_hooks())):
            return None
        return self.tensors()

    def is_whole(self) -> bool:
        """Return whether no tensor has been deleted by other code."""
        return all(hasattr(self, name) for name in self.names)

    def run_hooks(self) -> None:
        """Run torch's older hooks (pruning) that compute a tensor, since this module's forward is never called."""
        if self._forward_pre_hooks:
            for hook in self._writing_hooks():
                hook(self, ())

    def _writing_hooks(self) -> Iterator[Any]:
        """Yield the hooks of torch that recompute a tensor; all others are the user's."""
        hooks = self._forward_pre_hooks.values()
        return (h for h in hooks if str(getattr(h, "_tensor_name", getattr(h, "name", ""))) in self.names)

    def live(self, share: float) -> Any:
        """Return what the layer computes with in a model prepared for hot swaps; see ``_methods/padded.py``.

        Args:
            share: its weight among the active adapters, without its own strength.
        """
        return None

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all its tensors."""
        return cast("tuple[Tensor, ...]", (*self._parameters.values(), *self._buffers.values()))

    def own_dtype(self) -> torch.dtype:
        """Return the dtype of the change. A method: in a property, an AttributeError would hide what is missing."""
        return cast(Tensor, getattr(self, self.names[0])).dtype

    def extra_repr(self) -> str:
        """Return the line that ``print(model)`` shows."""
        dropout = f", dropout={self.dropout:g}" if self.dropout else ""
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        rank = f"rank={self.rank}, " if self.has_rank else ""
        strength = f", strength={self.strength:g}" if self.strength != 1 else ""
        return f"{rank}scaling={self.scaling:g}{strength}{options}{dropout}{', DoRA' if self.use_dora else ''}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A checkpoint of the base has no adapter keys: it loads, strict or not, and does not change the adapter.
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args)


def _shaped(weight: Tensor, shape: Shape) -> Tensor:
    """Reshape the weight if needed; timm's CondConv2d, for one, keeps several kernels in a row of its weight."""
    return weight if weight.ndim == len(shape) else weight.reshape(shape)


def _like(weight: Tensor, base: Tensor) -> Tensor:
    """Return the weight in the base's memory format."""
    if has_channels_last(base):
        return weight.movedim(1, -1).contiguous().movedim(-1, 1)
    return weight
