"""Which of three ways an adapted convolution takes in training, from its shapes.

- ``fused``: one convolution with W + ΔW; the factors' gradients through tensors of rank r.
- ``weight``: the same convolution; the factors' gradients from the dense gradient of the weight.
- ``branch``: the base's convolution, plus B applied to A ∗ x.

They differ in rounding only. ``fused`` pays for W + ΔW twice, whatever the image's size, so where few positions share
it ``branch`` is cheaper; ``weight`` wins where the layer has so few channels that rank-r tensors are no smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TrainingPath = Literal["auto", "fused", "weight", "branch"]
PATHS: tuple[TrainingPath, ...] = ("auto", "fused", "weight", "branch")

# Both as ``benchmarks/paths.py`` found them over ResNet-50 at 128 and 224 px, DenseNet-121, MobileNetV3, ConvNeXt-atto
# and EfficientNet-Lite0 on two x86 cores with AVX2: the choices lose 0.5 to 2.1 % of these layers' time.
BALANCE = 1.0
"""FLOPs that a machine does while it moves one byte between memory and cores."""
THIN = 12
"""A convolution to r channels runs as slowly as one to this many: vector units and threads idle. A product over
channels, which a 1×1 kernel is, does not."""

LAUNCHING: dict[str, int] = {"cpu": 500_000}
"""Numbers that a branch through torch's own autograd reads and writes beyond the own one, up to which its few calls
decide, by kind of device. As found over shapes of ResNet-50, MobileNetV3 and EfficientNet on one core with AVX2: 0.55
to 0.95 of the time below it, 0.97 to 1.4 above three times of it."""
LAUNCHING_ELSEWHERE = 10_000_000
"""The same for an accelerator, which moves twenty times as much in the time of a call. Not measured."""

PART = 4
"""Times that W + ΔW costs more than its arithmetic and traffic where an adapter has a part of a batch for itself: the
weight is packed again for few images. As found over ResNet-18 and ResNet-50 at 96 and 128 px with 2, 8 and 32 adapters
in a batch of 32, with the next: the choices lose 1 to 4 % of these layers' time."""
THIN_EACH = 28
"""As :data:`THIN`, where each sample has r channels of its own, in groups."""


@dataclass(frozen=True)
class LayerSizes:
    """What decides: a layer, its rank and its input. Counts, no units."""

    out_channels: int
    in_channels: int
    kernel: int
    """Positions in a kernel: 9 for 3×3."""
    groups: int
    rank: int
    inputs: int
    """Input positions: images × height × width."""
    outputs: int
    """Output positions."""
    input_grad: bool
    """Whether the gradient goes further back than this layer."""
    width: int = 4
    """Bytes in a number."""
    trains_A: bool = True
    """Whether A gets a gradient; B does."""

    @property
    def fan_in(self) -> int:
        """Columns of the weight matrix."""
        return self.in_channels // self.groups * self.kernel


def choose(sizes: LayerSizes) -> TrainingPath:
    """The path with the least estimated cost beyond what all three have in common."""
    if sizes.groups > 1:
        return "weight"  # rank-r tensors would need r channels for each group
    costs, best = estimate(sizes), PATHS[1]
    # Without a gradient to A the other two keep h in the place of x, and that is what A was frozen for.
    is_lean = not sizes.trains_A and sizes.rank * sizes.outputs < sizes.in_channels * sizes.inputs
    for path in PATHS[3:] if is_lean else PATHS[2:]:  # the compiler does not follow min with a key over symbols
        best = path if costs[path] < costs[best] else best
    return best


def launching_decides(s: LayerSizes, device: str) -> bool:
    """Whether a layer without groups is so small that calls count, and not arithmetic."""
    beyond = 4 * s.outputs * s.out_channels + 3 * s.inputs * s.in_channels
    return beyond <= LAUNCHING.get(device, LAUNCHING_ELSEWHERE)


def estimate(s: LayerSizes) -> dict[TrainingPath, float]:
    """Cost of each path in training, in FLOPs, bytes counted as FLOPs by :data:`BALANCE`.

    The base's convolution and its gradient to the input are in all of them, and not counted.
    """
    rank = max(s.rank, 1)
    thin = rank if s.kernel == 1 else max(rank, THIN)  # what the rank costs where it is a number of output channels
    weight, x, g = s.out_channels * s.fan_in, s.inputs * s.in_channels, s.outputs * s.out_channels

    def cost(flops: float, numbers: float) -> float:
        return flops + BALANCE * s.width * numbers

    passes = 2 if s.input_grad else 1  # W + ΔW is needed in the forward, and for the gradient to the input
    merge = passes * cost(2 * weight * rank, 3 * weight)
    mix = cost(2 * g * rank, g)  # t or dB: one pass over the output's gradient
    project = cost(2 * s.outputs * s.fan_in * thin, x)  # h, dA, or t back to the input: one pass over the input
    factors = 2 if s.trains_A else 1
    dense = cost(2 * s.outputs * s.fan_in * s.out_channels, x + g + weight) + factors * cost(2 * weight * rank, weight)
    low_rank = factors * (mix + project)
    branch = cost(2 * g * rank, 2 * g) + (cost(2 * s.outputs * s.fan_in * thin, 3 * x) if s.input_grad else 0.0)
    if s.input_grad and not s.trains_A:
        branch += mix  # t, for the gradient to the input alone
    return {"fused": merge + low_rank, "weight": merge + dense, "branch": branch + low_rank}


def branch_wins(s: LayerSizes, adapters: int, scattered: bool) -> bool:
    """Whether, in inference, a branch for each sample costs less than W + ΔW and a part of the batch for each adapter.

    Args:
        s: the layer and the whole batch.
        adapters: how many the batch goes to.
        scattered: whether their samples do not lie side by side, so that each part is gathered and put back.
    """
    weight, x, g = s.out_channels * s.fan_in, s.inputs * s.in_channels, s.outputs * s.out_channels
    branch = 2 * g * s.rank + 2 * s.outputs * s.fan_in * max(s.rank, THIN_EACH) + BALANCE * s.width * (x + 2 * g)
    part = PART * (2 * weight * s.rank + BALANCE * s.width * 3 * weight)
    copies = PART * (x + g) if scattered else g
    parts = adapters * part + BALANCE * s.width * 2 * copies
    return branch < parts
