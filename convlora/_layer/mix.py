"""The weighted sum of several changes of one layer, or one change whose strength is not 1."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from .change import Change
from .functional import Factors, in_dtype, no_autocast
from .kept import Scaling
from .paths import TrainingPath

Weighted = tuple[tuple[Change, float], ...]


class Mix:
    """W + Σ weight · (W' − W), where W' is what each change makes of the base's weight W by itself.

    The order does not matter, and changes of different methods may be mixed. It has the interface that a layer needs
    of a :class:`Change`.
    """

    use_dora = False  # DoRA's magnitudes are in each W' already
    scaling = 1.0  # weights and scalings are in each B already

    def __init__(self, parts: Weighted) -> None:
        self.parts = parts
        self.changes = tuple(change for change, _ in parts)

    @property
    def dropout(self) -> float:
        """The largest dropout among the changes."""
        return max(change.dropout for change in self.changes)

    @property
    def training_path(self) -> TrainingPath:
        """The training path that all changes share, or ``"auto"``."""
        paths = {change.training_path for change in self.changes}
        return paths.pop() if len(paths) == 1 else "auto"

    @property
    def numbers(self) -> Scaling:
        """All that the effective weight depends on besides tensors."""
        return tuple(float(number) for change, weight in self.parts for number in (weight, change.scaling))

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors of all changes."""
        return tuple(tensor for change in self.changes for tensor in change.tensors())

    def sources(self) -> tuple[Tensor, ...] | None:
        """As :meth:`Change.sources`."""
        each = [change.sources() for change in self.changes]
        return None if None in each else tuple(tensor for tensors in each for tensor in cast("tuple[Tensor]", tensors))

    def effective_weight(self, base: Tensor) -> Tensor:
        """What the layer computes with, in the base's dtype, shape and memory format; the sum is rounded once."""
        wide = torch.promote_types(base.dtype, torch.float32)
        for change in self.changes:
            wide = torch.promote_types(wide, change.own_dtype())
        with no_autocast(base.device.type):
            start = in_dtype(base, wide)
            weight = start
            for change, share in self.parts:
                weight = weight + share * (change.effective_weight(start) - start)
            return in_dtype(weight, base.dtype)

    def delta(self, base: Tensor) -> Tensor:
        """Σ weight · ΔW of this base weight."""
        return self.effective_weight(base) - base

    def factors(self) -> Factors | None:
        """A of all changes above one another, and B side by side, each times its weight and scaling; None as there."""
        return self._joined([None if change.use_dora else change.factors() for change in self.changes])

    def factors_at(self, base: Tensor) -> Factors | None:
        """The same, for training alone, of changes whose factors depend on the base's weight."""
        return self._joined([None if change.use_dora else change.factors_at(base) for change in self.changes])

    def _joined(self, pairs: list[Factors | None]) -> Factors | None:
        if None in pairs:
            return None
        each = [(*cast(Factors, p), w * c.scaling) for p, (c, w) in zip(pairs, self.parts, strict=True)]
        return torch.cat([A for A, _, _ in each]), torch.cat([strength * B for _, B, strength in each], dim=1)

    def output(self, *_: object) -> None:
        """Autograd goes through the effective weight."""
