"""(IA)³ and SSF: one trained number for each channel.

(IA)³: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", 2022
(arXiv:2205.05638). SSF: Lian et al., "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning",
2022 (arXiv:2210.08823).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from .._layer.change import Change, Option, Shape, Shapes
from .._layer.dora import scaled_weight


class IA3(Change):
    """W[o] · l[o], a scale l for each output channel o. The bias stays as it is.

    With ``on_input`` W[o, i] · l[i], a scale for each input channel instead. Training computes the base's output and
    multiplies its channels, so that there is no gradient of the weight; other forwards than torch's own and transposed
    convolutions take plain autograd.

    Layers that standardise each output channel's weight (timm's StdConv2d and ScaledStdConv2d) would divide l out again
    and are skipped, with the reason in the plan; ``on_input`` changes the weight that they standardise. So do DoRA's
    magnitudes, which take the place of a scale per output channel.

    Attributes:
        ia3_l: l, ``(1, C_out, 1, 1)``, or ``(out_features, 1)`` for a linear layer; with ``on_input``
            ``(1, C_in, 1, 1)`` or ``(1, in_features)``. One at the start.
    """

    method = "ia3"
    formula = "W · l, l for each output channel"
    fresh = "ia3_l is one"
    has_rank = False
    has_alpha = False
    by_channel = True
    defaults: ClassVar[Mapping[str, Option]] = {"on_input": False}
    scale: ClassVar[str] = "ia3_l"
    """The name of its tensor."""

    @classmethod
    def shapes(
        cls,
        weight: Shape,
        rank: int,
        *,
        groups: int = 1,
        transposed: bool = False,
        on_input: bool = False,
        **options: Any,
    ) -> Shapes:
        """Return the shape of l."""
        spread, own = weight[1] * groups, weight[0]
        count = own if on_input == transposed else spread
        return {cls.scale: (1, count, *[1] * len(weight[2:])) if on_input or len(weight) > 2 else (count, 1)}

    @classmethod
    def idle_in(cls, layer: nn.Module, *, on_input: bool = False, **options: Any) -> str:
        """Return the reason for layers whose forward would divide the scale out."""
        standardised = any(kind.__module__ == "timm.layers.std_conv" for kind in type(layer).__mro__)
        return "" if on_input or not standardised else "it standardises its weight, which takes a scale out again"

    def begin(self) -> None:
        """Initialise l with ones."""
        nn.init.ones_(self.get_parameter(self.scale))

    def is_fresh(self) -> bool:
        """Return whether l is still one."""
        return bool((self._scale() == 1).all())

    def changed(self, weight: Tensor) -> Tensor:
        """Multiply the weight by l."""
        scale = self._scale()
        if not self.options.get("on_input"):
            return scaled_weight(weight, scale, self.groups)
        if self.groups:  # of a transposed convolution, whose rows are its input channels
            return scaled_weight(weight, scale, 0)
        each = scale.view(-1, 1, weight.shape[1], *[1] * (weight.ndim - 2))  # of every group
        return (weight.reshape(each.shape[0], -1, *weight.shape[1:]) * each).view(weight.shape)

    def output(self, x: Tensor, bias: Tensor | None, compute: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Multiply the base's output (without its bias) by l, or with ``on_input`` the base's input."""
        self.run_hooks()
        scale = self._scale()
        if self.scaling != 1 or self.use_dora or not scale.requires_grad:
            return None
        scale = scale.view(-1, *[1] * len(self.weight_shape[2:]))
        if self.options.get("on_input"):
            fits = x.ndim >= scale.ndim and x.shape[-scale.ndim] == scale.shape[0]  # else the layer refuses x
            return compute((x * scale).to(x.dtype)) if fits else None
        y = compute(x)
        if bias is None:
            return (y * scale).to(y.dtype)
        return (y * scale + bias.view(scale.shape) * (1 - scale)).to(y.dtype)

    def _scale(self) -> Tensor:
        tensor: Tensor = getattr(self, self.scale)
        return tensor.flatten()


class SSF(IA3):
    """W[o] · γ[o], and the layer's bias is trained, too: scale and shift.

    The paper's output is γ · (W x + b) + β; the bias that is trained here is γ · b + β. A layer without a bias has the
    scale alone, and the plan says so. On a half-precision base the bias is trained in the base's dtype, the scale in
    fp32.

    Attributes:
        ssf_scale: γ, ``(1, C_out, 1, 1)``, or ``(out_features, 1)`` for a linear layer. One at the start.
    """

    method = "ssf"
    formula = "W · γ, γ for each output channel, and the bias"
    fresh = "ssf_scale is one"
    trains_bias = True
    defaults: ClassVar[Mapping[str, Option]] = {}
    scale = "ssf_scale"
