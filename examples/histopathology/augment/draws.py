"""Random numbers for augmentation: each patch has its own stream, which depends on seed, epoch and patch alone.

A patch is therefore augmented in the same way whatever the batch, the worker, the process and the device. The streams
are SplitMix64's (G. L. Steele, D. Lea, C. H. Flood. Fast splittable pseudorandom number generators. OOPSLA 2014),
which draws a batch's numbers in one vectorised step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_Words = npt.NDArray[np.uint64]
_GOLDEN = 0x9E3779B97F4A7C15


def mixed(*numbers: int) -> int:
    """Hash several numbers into one seed, so that neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Draws:
    """The random streams of a batch's patches; each call draws the next number of every stream.

    >>> Draws(seed=0, epoch=3, indices=[5, 17]).uniform().shape
    (2,)

    Attributes:
        indices: ``(n,)`` int64, the patches' indices in their split.
    """

    def __init__(self, seed: int, epoch: int, indices: Sequence[int] | npt.NDArray[np.int64]) -> None:
        self.indices = np.asarray(indices, np.int64)
        base = np.uint64(mixed(seed, epoch))
        self._streams = _scrambled(base + np.uint64(_GOLDEN) * (self.indices.astype(np.uint64) + np.uint64(1)))
        self._taken = 0

    def __len__(self) -> int:
        return len(self.indices)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Floats:
        """One number in [low, high) for each patch, ``(n,)``."""
        self._taken += 1
        words = _scrambled(self._streams + np.uint64(_GOLDEN * self._taken % 2**64))
        numbers: Floats = low + (high - low) * ((words >> np.uint64(11)) * 2.0**-53)
        return numbers

    def below(self, count: int | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """One whole number in [0, count) for each patch, ``(n,)``."""
        return np.minimum((self.uniform() * count).astype(np.int64), count - 1)


def _scrambled(words: _Words) -> _Words:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    scrambled: _Words = words ^ (words >> np.uint64(31))
    return scrambled
