"""What one layer has of one adapter: a change of its weight. All that is the same for every method.

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
        scaling: how strong the change is; alpha / rank, or alpha / √rank with rsLoRA, in methods that have an alpha.
        strength: how much of the whole change counts, W + strength · (W' − W); see :func:`convlora.set_scale`.
        dropout: probability with which the inputs of the change are zeroed in training.
        path: which way a convolution with factors takes in training; see ``paths.py``.
        groups: of a transposed convolution, which keeps ``(C_in, C_out / groups, kH, kW)``; 0 for every other layer.
        lora_magnitude: only with DoRA: ``(C_out,)``, the size of the weight that meets each output channel.
    """

    method: ClassVar[str]
    formula: ClassVar[str]
    fresh: ClassVar[str] = "factor is as it began"
    """What a warning says of every layer where nothing was trained."""
    inits: ClassVar[tuple[str, ...]] = ("kaiming",)
    """Ways in which it may begin."""
    has_rank: ClassVar[bool] = True
    """Whether its size depends on a rank."""
    has_alpha: ClassVar[bool] = True
    """Whether ``scaling`` comes from an alpha; else it is 1, and one that is set by hand takes W part of the way."""
    defaults: ClassVar[Mapping[str, Option]] = {}
    """What it may be asked besides, ``method_options``, with the values that it has otherwise."""
    by_channel: ClassVar[bool] = False
    """Whether :meth:`shapes` is told besides how channels lie in the weight: ``groups`` and ``transposed``."""
    trains_bias: ClassVar[bool] = False
    """Whether the layer's own bias, where it has one, is trained and belongs to the adapter."""
    fast: ClassVar[tuple[str, ...]] = ()
    """Tensors that may learn at a higher rate, see :func:`convlora.parameter_groups`. As LoRA's B, they begin at zero,
    the others' gradient is zero until they move, and they read what the others make of the layer's input."""
    ranks: ClassVar[str] = ""
    """Why :meth:`rank_at` may be lower than the rank that is asked for."""
    use_dora: bool = False

    def __init__(
        self,
        weight_shape: Shape,
        like: Tensor,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        path: TrainingPath = "auto",
        *,
        groups: int = 1,
        transposed: bool = False,
        **options: Option,
    ) -> None:
        super().__init__()
        # fp32 also on half-precision bases: steps of 1e-4 vanish in bf16.
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.weight_shape = tuple(weight_shape)
        self.rank = rank
        self.options = {**self.defaults, **options}
        self.scaling = scaling
        self.strength = 1.0
        self.dropout = dropout
        self.path: TrainingPath = path
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
        """The trained tensors by name.

        Raises:
            TargetError: there is no such change of a weight of this shape; the layer's name is put before.
        """
        raise NotImplementedError

    @classmethod
    def rank_at(cls, weight: Shape, rank: int, **options: Any) -> int:
        """The largest rank up to this one that there is for a weight of this shape; 0 where there is none."""
        return rank

    @classmethod
    def idle_in(cls, layer: nn.Module, **options: Any) -> str:
        """Why it would change nothing that this layer computes; empty where it does."""
        return ""

    @classmethod
    def constants(cls, weight: Shape, rank: int, **options: Any) -> Shapes:
        """The tensors by name that belong to the adapter and are not trained."""
        return {}

    def begin(self) -> None:
        """Fill the tensors, which are zeros, so that the weight is the base's to the bit."""
        raise NotImplementedError

    def is_fresh(self) -> bool:
        """Whether the tensors still change nothing."""
        raise NotImplementedError

    def changed(self, weight: Tensor) -> Tensor:
        """The new weight of a base weight, which comes in ``weight_shape``, in the wider dtype of the two."""
        raise NotImplementedError

    def factors(self) -> Factors | None:
        """A ``(r, *weight_shape[1:])`` and B ``(C_out, r)`` where the change is scaling · B @ A; else None.

        r is ``rank``, or 2 · ``rank`` for the anchored LoRA of PiSSA and OLoRA.
        """
        return None

    def factors_at(self, base: Tensor) -> Factors | None:
        """The same, for training alone, of a change whose factors depend on the base's weight."""
        return self.factors()

    def output(self, x: Tensor, bias: Tensor | None, compute: Callable[[Tensor], Tensor]) -> Tensor | None:
        """A plain layer's output in training by tensors smaller than its weight; None for autograd through the weight.

        Args:
            x: the input.
            bias: the layer's.
            compute: the base's own forward, with that bias.
        """
        return None

    @classmethod
    def stored_shapes(cls, weight: Shape, rank: int, **options: Any) -> Shapes:
        """Shapes in a file, by what follows the layer's name in the key."""
        return cls.shapes(weight, rank, **options) | cls.constants(weight, rank, **options)

    def stored(self) -> Mapping[str, Tensor]:
        """The tensors as a file holds them, by the names of :meth:`stored_shapes`."""
        return {name: getattr(self, name) for name in self.names}

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """Take the numbers that :meth:`stored` gave."""
        for name in self.names:
            getattr(self, name).copy_(stored[name])

    # ---- what follows from it

    def effective_weight(self, base: Tensor) -> Tensor:
        """What the layer computes with in the place of its base weight, in its dtype, shape and memory format."""
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
        """ΔW of this base weight; with DoRA, before the magnitudes."""
        weight = self._wide(base)
        return _shaped(self._strengthened(weight) - weight, base.shape)

    def _strengthened(self, weight: Tensor) -> Tensor:
        """The new weight of a wide one; with a scaling that is the user's own, that part of the way to it."""
        changed = self.changed(weight)
        return changed if self.has_alpha or self.scaling == 1 else torch.lerp(weight, changed, self.scaling)

    def _wide(self, base: Tensor) -> Tensor:
        self.run_hooks()
        return _shaped(in_dtype(base, torch.promote_types(base.dtype, self.own_dtype())), self.weight_shape)

    def scaled_output(self, layer: nn.Module, y: Tensor, base: Tensor) -> Tensor:
        """With DoRA, the output of a layer that computed y before the magnitudes."""
        with no_autocast(base.device.type):
            with torch.no_grad():
                changed = self._strengthened(self._wide(base))
            scale = channel_scale(self.lora_magnitude, changed, 0)
        return scaled_output(y, scale, cast("Tensor | None", layer.bias), -1 if isinstance(layer, nn.Linear) else 1)

    def give_magnitudes(self, norms: Tensor) -> None:
        """Make it DoRA, with these sizes of the output channels' weights."""
        self.use_dora = True
        self.lora_magnitude = nn.Parameter(norms)

    @property
    def numbers(self) -> Scaling:
        """All that the effective weight depends on besides tensors."""
        return self.scaling

    @property
    def parts(self) -> tuple[tuple[Change, float], ...]:
        """Itself, in full; see ``mix.py``."""
        return ((self, 1.0),)

    def sources(self) -> tuple[Tensor, ...] | None:
        """All tensors that the effective weight is computed from besides the base's.

        None where one of them is itself computed (``parametrize``, pruning), by code that may read anything.
        """
        if self._modules or (self._forward_pre_hooks and any(self._writing_hooks())):
            return None
        return self.tensors()

    def is_whole(self) -> bool:
        """Whether other code has left it all its tensors."""
        return all(hasattr(self, name) for name in self.names)

    def run_hooks(self) -> None:
        """Let torch's older hooks, pruning's among them, compute their tensor; nothing calls this module's forward."""
        if self._forward_pre_hooks:
            for hook in self._writing_hooks():
                hook(self, ())

    def _writing_hooks(self) -> Iterator[Any]:
        """Those of torch's hooks that write a tensor's attribute anew; others are a user's."""
        hooks = self._forward_pre_hooks.values()
        return (h for h in hooks if str(getattr(h, "_tensor_name", getattr(h, "name", ""))) in self.names)

    def live(self, share: float) -> Any:
        """In a model that is prepared for hot swaps, what its layer computes with; see ``_methods/padded.py``.

        Args:
            share: its weight among the adapters that are active, its own strength not included.
        """
        return None

    def tensors(self) -> tuple[Tensor, ...]:
        """All that it holds."""
        return cast("tuple[Tensor, ...]", (*self._parameters.values(), *self._buffers.values()))

    def own_dtype(self) -> torch.dtype:
        """In which the change is computed. No property, whose AttributeError would name it and not what is missing."""
        return cast(Tensor, getattr(self, self.names[0])).dtype

    def extra_repr(self) -> str:
        """The line that ``print(model)`` shows."""
        dropout = f", dropout={self.dropout:g}" if self.dropout else ""
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        rank = f"rank={self.rank}, " if self.has_rank else ""
        strength = f", strength={self.strength:g}" if self.strength != 1 else ""
        return f"{rank}scaling={self.scaling:g}{strength}{options}{dropout}{', DoRA' if self.use_dora else ''}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A checkpoint of the base holds no adapter at all: it loads, strictly too, and leaves it as it is.
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args)


def _shaped(weight: Tensor, shape: Shape) -> Tensor:
    """In this shape; a layer such as timm's CondConv2d has several kernels in a row of its weight."""
    return weight if weight.ndim == len(shape) else weight.reshape(shape)


def _like(weight: Tensor, base: Tensor) -> Tensor:
    """The weight in the base's memory format."""
    if has_channels_last(base):
        return weight.movedim(1, -1).contiguous().movedim(-1, 1)
    return weight
