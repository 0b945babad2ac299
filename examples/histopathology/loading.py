"""Batches: a split as one method sees it, and which patches each process gets in which order.

Every draw of augmentation is a function of (seed, epoch, patch): not of the batch that a patch is in, nor of the worker
or process that reads it. So a training is the same with any number of workers, goes on after an interruption where it
was, and several processes together see what one would.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .data import HistoDataset, Sample, Transform
from .errors import ExampleError

# Batches of (images or features, labels, indices).
Loader: TypeAlias = "DataLoader[Sample]"


def mixed(*numbers: int) -> int:
    """One seed from several numbers, such that neighbours give unrelated ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class View(Dataset[Sample]):
    """A split's patches through a transform.

    Args:
        split: a dataset of ``(image, label, index)`` with ``labels`` and ``centres``; its own transform is not used.
        transform: of one image ``(3, H, W)``; or one for each centre.
        seed: of the transform's draws, where it makes any.
    """

    def __init__(self, split: HistoDataset, transform: Transform | Mapping[int, Transform], seed: int = 0) -> None:
        split.transform = None
        self.split, self.transform, self.seed = split, transform, seed
        self.labels = split.labels
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """The samples of one batch; DataLoader calls this where it exists."""
        samples = self.split.__getitems__(indices)
        with torch.random.fork_rng(devices=[]):
            return [(self._transformed(image, int(i)), label, int(i)) for image, label, i in samples]

    def _transformed(self, image: Tensor, index: int) -> Tensor:
        transform = self.transform
        if isinstance(transform, Mapping):
            transform = transform[int(self.split.centres[index])]
        torch.default_generator.manual_seed(mixed(self.seed, self.epoch, index))
        return transform(image)


class Batches(Sampler[list[int]]):
    """Indices of each batch, of which a process gets its part: the parts of all make the batch of one process.

    Shuffled anew for each epoch where a seed is given (the epoch is the sampler's whole state), with full batches
    only: a last batch of one patch would stop BatchNorm in train mode. Else in order, all of them, each process taking
    every n-th index.
    """

    def __init__(self, size: int, batch_size: int, *, seed: int | None = None, rank: int = 0, world: int = 1) -> None:
        self.size, self.batch_size, self.seed, self.rank, self.world = size, batch_size, seed, rank, world
        self.epoch = 0

    def __len__(self) -> int:
        if self.seed is None:
            return -(-len(range(self.rank, self.size, self.world)) // self.batch_size)
        return max(1, self.size // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        if self.seed is None:
            own = list(range(self.rank, self.size, self.world))
            yield from (own[start : start + self.batch_size] for start in range(0, len(own), self.batch_size))
            return
        generator = torch.Generator().manual_seed(mixed(self.seed, self.epoch))
        order = torch.randperm(self.size, generator=generator).tolist()
        for number in range(len(self)):
            batch = order[number * self.batch_size : (number + 1) * self.batch_size]
            part = len(batch) // self.world
            yield batch[self.rank * part : (self.rank + 1) * part]


def make_loader(
    dataset: Dataset[Sample],
    batch_size: int,
    *,
    workers: int = 0,
    seed: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Loader:
    """Batches of ``(images, labels, indices)``; shuffled by the seed for training, without one in order.

    Raises:
        ExampleError: a batch that the processes cannot share equally.
    """
    size = len(dataset)  # type: ignore[arg-type]
    if seed is not None and (batch_size % world or size < world):
        raise ExampleError(
            f"--batch-size {batch_size}: {world} processes share each batch, so give a multiple of {world} "
            "and at least as many patches."
        )
    return DataLoader(
        dataset,
        batch_sampler=Batches(size, batch_size, seed=seed, rank=rank, world=world),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else each pass would take a number from the generator that dropout draws from
    )


def begin_epoch(loader: Loader, epoch: int) -> None:
    """Another order, and other draws of augmentation."""
    sampler: Any = loader.batch_sampler
    sampler.epoch = epoch
    dataset: Any = loader.dataset
    dataset.epoch = epoch
