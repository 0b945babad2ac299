"""EVA: initialises lora_A from the layer's inputs in a few batches (Paischer et al. 2024, arXiv:2410.07170).

The rows of lora_A are the leading right singular vectors of the layer's im2col patches, not centred. Batches are read
one by one until each layer's directions have converged. Nothing is random: the same batches give the same directions.

Memory is bounded. Patches are unfolded in small parts. A layer keeps the Gram matrix Σ patch · patchᵀ if it is small,
or else a sketch of a few rows (frequent directions; Ghashami et al. 2016, arXiv:1501.01711). With l rows, the sketch
underestimates the energy in any direction by at most the energy outside the best k directions divided by l + 1 − k,
for each k ≤ l.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from .._plan import LayerPlan
from ..errors import TargetError
from .observe import base_alone, run_batch

CONVERGED = 0.01
"""Directions have converged if those of the batches before miss at most this share of the energy that new ones keep."""
WHOLE_UP_TO = 512
"""The largest number of columns for which Σ patch · patchᵀ is kept: 1 MB in fp32."""
AT_ONCE = 2**21
"""The number of values that are unfolded into patches at a time."""


def leading_directions(
    planned: Sequence[LayerPlan], root: nn.Module, layers: Mapping[str, nn.Module], data: Iterable[Any]
) -> dict[str, Tensor]:
    """Return each layer's A of shape ``(rank, fan_in)`` by name, at least in fp32. The model is not changed.

    Args:
        planned: the plans of the layers.
        root: the model.
        layers: the layers, by name.
        data: batches, or a single batch (a tensor or a mapping).

    Raises:
        TargetError: the data hold no batch, do not reach a layer, or a layer's input is not finite.
    """
    met = {p.name: _Met(layers[p.name], p) for p in planned}
    moving, batches = list(met.values()), 0
    with base_alone(root), ExitStack() as hooks:
        for each in moving:
            hooks.callback(each.hook.remove)
        for batch in [data] if isinstance(data, (Tensor, Mapping)) else data:
            run_batch(root, batch)
            batches += 1
            _refuse("is not finite in", [name for name, each in met.items() if not math.isfinite(each.new)])
            moving = [each for each in moving if not each.has_converged()]
            if all(each.directions is None for each in moving):  # layers that no batch reached are refused below
                break
    if not batches:
        raise TargetError("init_data holds no batch (an iterator that is exhausted?). Nothing was changed.")
    _refuse("does not reach", [name for name, each in met.items() if each.directions is None])
    return {name: cast(Tensor, each.directions) for name, each in met.items()}


def _refuse(fault: str, names: Sequence[str]) -> None:
    if names:
        raise TargetError(
            f"init_data {fault} {', '.join(names)}; give other batches, or leave these layers out with "
            "exclude_modules. Nothing was changed."
        )


class _Met:
    """The input patches that one layer has seen so far, and their leading directions. Its groups share one A."""

    def __init__(self, layer: nn.Module, planned: LayerPlan) -> None:
        like = next(p for p in layer.parameters() if p.is_floating_point())
        self.rank = planned.rank
        self.columns = math.prod(planned.weight_shape[1:])
        self.sum = _Sum(self.columns, self.rank, like)
        self.energy = self.new = 0.0
        """The sum of squares of all patches before the last batch, and of the last batch."""
        self.is_new = False
        self.directions: Tensor | None = None
        self.hook = layer.register_forward_hook(self._see, with_kwargs=True)

    def has_converged(self) -> bool:
        """Update the directions after a batch; return whether the previous ones were nearly as good.

        The energy that the previous directions miss is compared with the last batch's share of all energy. So the
        criterion does not become weaker with the number of batches, and approximates the energy missed in new images.
        """
        if not self.is_new:
            return False
        before, self.directions = self.directions, self.sum.leading(self.rank)
        self.energy += self.new
        share, self.new, self.is_new = self.new / max(self.energy, 1e-30), 0.0, False
        if before is None:
            return False
        most = self.sum.kept(self.directions)
        if most - self.sum.kept(before) > CONVERGED * share * most:
            return False
        self.hook.remove()
        del self.sum
        return True

    def _see(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = (args[0] if args else kwargs["input"]).detach().to(self.sum.numbers.dtype)
        leading = x.ndim - 1
        if not isinstance(layer, nn.Linear):
            conv = cast(_ConvNd, layer)
            axes = len(conv.kernel_size)
            images = x if x.ndim == axes + 2 else x[None]
            x, leading = _patches(conv, images, output.shape[-axes:]), axes + 1
        for part in _parts(x, leading) if x.numel() else ():
            rows = part.reshape(-1, self.columns)
            self.sum.add(rows)
            self.new += float(rows.norm()) ** 2
            self.is_new = True


def _parts(patches: Tensor, leading: int) -> Iterator[Tensor]:
    """Yield the patches in parts of a few positions; the first ``leading`` dimensions are positions."""
    each = patches[0].numel()
    if each > AT_ONCE and leading > 1:
        for inner in patches:
            yield from _parts(inner, leading - 1)
    else:
        yield from torch.split(patches, max(1, AT_ONCE // each))


class _Sum:
    """Σ row · rowᵀ over all rows: the matrix itself, ``(columns, columns)``, or a sketch whose Gram matrix is close."""

    def __init__(self, columns: int, rank: int, like: Tensor) -> None:
        self.half = 2 * rank + 32
        """The number of rows of the sketch each time that it was halved."""
        self.is_whole = columns <= max(WHOLE_UP_TO, 2 * self.half)
        self.used = 0
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.numbers = like.new_zeros(columns if self.is_whole else 2 * self.half, columns, dtype=dtype)

    def add(self, rows: Tensor) -> None:
        if self.is_whole:
            self.numbers.addmm_(rows.T, rows)
            return
        for part in torch.split(rows, self.half):
            if self.used + len(part) > len(self.numbers):
                self._halve()
            self.numbers[self.used : self.used + len(part)] = part
            self.used += len(part)

    def _halve(self) -> None:
        """Rotate the rows to their singular vectors, and subtract from each the energy of the first one dropped."""
        energies, vectors = self._of_rows()
        kept, after = energies[: self.half], energies[self.half]
        weight = ((kept - after).clamp_min(0) / kept.clamp_min(torch.finfo(kept.dtype).tiny)).sqrt()
        self.numbers[: self.half] = (vectors[:, : self.half] * weight).T @ self.numbers
        self.numbers[self.half :] = 0
        self.used = self.half

    def _of_rows(self) -> tuple[Tensor, Tensor]:
        """Return the rows' squared singular values, the largest first, and their left singular vectors."""
        energies, vectors = torch.linalg.eigh(self.numbers @ self.numbers.T)
        return energies.flip(0), vectors.flip(1)

    def leading(self, rank: int) -> Tensor:
        """Return the directions with the most energy as orthonormal rows, ``(rank, columns)``."""
        if self.is_whole:
            vectors: Tensor = torch.linalg.eigh(self.numbers).eigenvectors
            return vectors.flip(1)[:, :rank].T
        found = self._of_rows()[1][:, :rank].T @ self.numbers
        directions: Tensor = torch.linalg.qr(found.T).Q.T
        return directions

    def kept(self, directions: Tensor) -> float:
        """Return the energy in these directions."""
        seen = self.numbers @ directions.T
        return float((seen * directions.T).sum() if self.is_whole else seen.square().sum())


def _patches(conv: _ConvNd, images: Tensor, outputs: Sequence[int]) -> Tensor:
    """Return the im2col patches of images ``(N, C_in, *spatial)`` as a view ``(N, *outputs, C_in, *kernel)``."""
    axes = range(len(conv.kernel_size))
    spans = [conv.dilation[i] * (conv.kernel_size[i] - 1) + 1 for i in axes]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(images, conv._reversed_padding_repeated_twice, mode)
    if any((padded.shape[i + 2] - spans[i]) // conv.stride[i] + 1 != outputs[i] for i in axes):
        # The layer's own forward pads, like TensorFlow (timm's Conv2dSame): an odd zero is added at the end.
        total = [max((outputs[i] - 1) * conv.stride[i] + spans[i] - images.shape[i + 2], 0) for i in axes]
        padded = F.pad(images, [zeros for t in reversed(total) for zeros in (t // 2, t - t // 2)])
    for i in axes:
        padded = padded.unfold(i + 2, spans[i], conv.stride[i])[..., :: conv.dilation[i]]
    return padded.movedim(1, len(axes) + 1)
