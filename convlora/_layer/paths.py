"""The choice among three ways to compute an adapted convolution in training, from the layer's sizes.

- ``fused``: one convolution with W + ΔW; the gradients of A and B come through tensors of r channels.
- ``weight``: the same convolution; the gradients of A and B come from the dense weight gradient.
- ``branch``: the base's convolution plus B applied to A ∗ x.

Their results differ in rounding only. ``fused`` computes W + ΔW twice per step, whatever the image size, so for small
images ``branch`` is cheaper. ``weight`` is cheapest for layers with so few channels that tensors of r channels are not
smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TrainingPath = Literal["auto", "fused", "weight", "branch"]
PATHS: tuple[TrainingPath, ...] = ("auto", "fused", "weight", "branch")

# The next two were fitted by ``benchmarks/paths.py`` on ResNet-50 at 128 and 224 px, DenseNet-121, MobileNetV3,
# ConvNeXt-atto and EfficientNet-Lite0, on two x86 cores with AVX2: the choices lose 0.5 to 2.1 % of these layers' time.
BALANCE = 1.0
"""FLOPs that take as long as moving one byte between memory and cores."""
THIN = 12
"""A convolution to r output channels takes as long as one to this many, if r is smaller, because vector units and
threads idle. This does not apply to 1×1 kernels, which are matrix products over channels."""

LAUNCHING: dict[str, int] = {"cpu": 500_000}
"""By device type: a branch through torch's own autograd makes fewer calls than ours but reads and writes more elements.
It is used while that excess is at most this many elements. Measured on layers of ResNet-50, MobileNetV3 and
EfficientNet on one core with AVX2: its time is 0.55 to 0.95 of ours below the limit, and 0.97 to 1.4 above three times
the limit."""
LAUNCHING_ELSEWHERE = 10_000_000
"""The same limit on accelerators, which move twenty times as much data in the time of one call. Not measured."""

PART = 4
"""Where each adapter computes its own part of a batch, W + ΔW takes this many times its estimate in FLOPs and bytes,
because torch packs the new weight for few images. Fitted together with ``THIN_EACH`` on ResNet-18 and ResNet-50 at 96
and 128 px, with 2, 8 and 32 adapters in a batch of 32: the choices lose 1 to 4 % of these layers' time."""
THIN_EACH = 28
"""As :data:`THIN`, for a grouped convolution that computes r channels for each sample."""


@dataclass(frozen=True)
class LayerSizes:
    """The counts that decide the path: those of a layer, its rank and its input."""

    out_channels: int
    in_channels: int
    kernel: int
    """Elements of a kernel per channel: 9 for 3×3."""
    groups: int
    rank: int
    inputs: int
    """Input positions: images × height × width."""
    outputs: int
    """Output positions."""
    input_grad: bool
    """Whether the input gradient is needed."""
    width: int = 4
    """Bytes per element."""
    trains_A: bool = True
    """Whether A is trained; B always is."""

    @property
    def fan_in(self) -> int:
        """The number of columns of the weight matrix."""
        return self.in_channels // self.groups * self.kernel


def choose(sizes: LayerSizes) -> TrainingPath:
    """Return the path with the lowest estimated cost."""
    if sizes.groups > 1:
        return "weight"  # rank-r tensors would need r channels for each group
    costs, best = estimate(sizes), PATHS[1]
    # With A frozen, ``fused`` and ``branch`` keep h instead of x for the backward; saving memory is why A was frozen.
    is_lean = not sizes.trains_A and sizes.rank * sizes.outputs < sizes.in_channels * sizes.inputs
    for path in PATHS[3:] if is_lean else PATHS[2:]:  # the compiler does not follow min with a key over symbols
        best = path if costs[path] < costs[best] else best
    return best


def launching_decides(s: LayerSizes, device: str) -> bool:
    """Return whether a layer without groups is so small that the number of calls decides its time."""
    beyond = 4 * s.outputs * s.out_channels + 3 * s.inputs * s.in_channels
    return beyond <= LAUNCHING.get(device, LAUNCHING_ELSEWHERE)


def estimate(s: LayerSizes) -> dict[TrainingPath, float]:
    """Estimate the cost of each path in training, in FLOPs; :data:`BALANCE` converts bytes to FLOPs.

    The base's convolution and its input gradient are part of every path and not counted.
    """
    rank = max(s.rank, 1)
    thin = rank if s.kernel == 1 else max(rank, THIN)  # what the rank costs where it is a number of output channels
    weight, x, g = s.out_channels * s.fan_in, s.inputs * s.in_channels, s.outputs * s.out_channels

    def cost(flops: float, numbers: float) -> float:
        return flops + BALANCE * s.width * numbers

    passes = 2 if s.input_grad else 1  # W + ΔW is needed in the forward and for the input gradient
    merge = passes * cost(2 * weight * rank, 3 * weight)
    mix = cost(2 * g * rank, g)  # t or dB: one pass over the output's gradient
    project = cost(2 * s.outputs * s.fan_in * thin, x)  # h, dA, or t back to the input: one pass over the input
    factors = 2 if s.trains_A else 1
    dense = cost(2 * s.outputs * s.fan_in * s.out_channels, x + g + weight) + factors * cost(2 * weight * rank, weight)
    low_rank = factors * (mix + project)
    branch = cost(2 * g * rank, 2 * g) + (cost(2 * s.outputs * s.fan_in * thin, 3 * x) if s.input_grad else 0.0)
    if s.input_grad and not s.trains_A:
        branch += mix  # t, which only the input gradient needs
    return {"fused": merge + low_rank, "weight": merge + dense, "branch": branch + low_rank}


def branch_wins(s: LayerSizes, adapters: int, scattered: bool) -> bool:
    """Return whether, in inference, one branch per sample costs less than one W + ΔW per adapter.

    Args:
        s: the layer and the whole batch.
        adapters: how many adapters the batch's samples use.
        scattered: whether an adapter's samples are not consecutive, so that they must be gathered and put back.
    """
    weight, x, g = s.out_channels * s.fan_in, s.inputs * s.in_channels, s.outputs * s.out_channels
    branch = 2 * g * s.rank + 2 * s.outputs * s.fan_in * max(s.rank, THIN_EACH) + BALANCE * s.width * (x + 2 * g)
    part = PART * (2 * weight * s.rank + BALANCE * s.width * 3 * weight)
    copies = PART * (x + g) if scattered else g
    parts = adapters * part + BALANCE * s.width * 2 * copies
    return branch < parts
