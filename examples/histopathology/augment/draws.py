"""Random numbers of augmentation: for each patch a stream of its own, a function of seed, epoch and patch alone.

So a patch is augmented alike whatever batch it is in, whichever worker or process reads it and whichever device works
on it. The streams are SplitMix64's (G. L. Steele, D. Lea, C. H. Flood. Fast splittable pseudorandom number generators.
OOPSLA 2014), which takes a batch's numbers in one vectorised step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_Words = npt.NDArray[np.uint64]
_GOLDEN = 0x9E3779B97F4A7C15


def mixed(*numbers: int) -> int:
    """One seed from several numbers, such that neighbours give unrelated ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Draws:
    """The next numbers of each patch of a batch.

    >>> Draws(seed=0, epoch=3, indices=[5, 17]).uniform().shape
    (2,)

    Attributes:
        indices: ``(n,)`` int64, the patches.
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
        """One whole number from 0 up to and without ``count`` for each patch, ``(n,)``."""
        return np.minimum((self.uniform() * count).astype(np.int64), count - 1)


def _scrambled(words: _Words) -> _Words:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    scrambled: _Words = words ^ (words >> np.uint64(31))
    return scrambled
