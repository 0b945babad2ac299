"""Batches: a split under a method's transforms, and the order of patches in each process.

Random numbers of augmentation depend on (seed, epoch, patch), not on the batch, the worker or the process. A training
is therefore the same with any number of workers, after an interruption, and with several processes together.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from ..augment.draws import Draws, mixed
from ..augment.transforms import Transform
from ..data.dataset import HistoDataset, Sample
from ..errors import ExampleError

Batch: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Images or features, labels (NaN where absent), indices."""


class Batched(Protocol):
    """A dataset for `Loader`, which returns whole batches in two steps: reading and transforming."""

    epoch: int

    def __len__(self) -> int:
        """Patches."""

    def __getitem__(self, index: int) -> Sample:
        """Read and transform one sample."""

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Read a batch."""

    def transformed(self, batch: Batch, device: torch.device | None = None) -> Batch:
        """Transform a batch that was read, on the device."""


class View:
    """A split's patches under a transform, a batch at a time.

    Args:
        split: a dataset of ``(image, label, index)`` with ``labels`` and ``centres``; its own transform is not used.
        transform: takes a batch ``(n, 3, H, W)`` and the random numbers of its patches.
        seed: seed of the random numbers.
    """

    def __init__(self, split: HistoDataset, transform: Transform, seed: int = 0) -> None:
        self.split, self.transform, self.seed = split, transform, seed
        self.labels = split.labels
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Sample:
        images, labels, _ = self.transformed(self.__getitems__([index]))
        return images[0], labels[0], index

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Read the patches of one batch without a transform; DataLoader calls this if it exists."""
        images = torch.from_numpy(self.split.read(indices))
        rows = torch.as_tensor(indices)
        return images, labels_of(self.labels, rows), rows

    def transformed(self, batch: Batch, device: torch.device | None = None) -> Batch:
        """Transform a batch of patches on the device."""
        images, labels, rows = batch
        images = images.to(device, non_blocking=True)
        return self.transform(images, Draws(self.seed, self.epoch, rows.numpy())), labels, rows


def labels_of(labels: Tensor | None, rows: Tensor) -> Tensor:
    """Labels of some patches as floats, NaN if there are none."""
    return torch.full(rows.shape, torch.nan) if labels is None else labels[rows].float()


class Batches(Sampler[list[int]]):
    """The indices of each batch; each process gets its part, and the parts together are the batch of one process.

    With a seed the indices are shuffled for each epoch (the epoch is the sampler's only state), and batches are full: a
    last batch of one patch would stop BatchNorm in train mode. Without a seed all indices come in order, and each
    process takes every n-th.
    """

    def __init__(
        self, size: int, batch_size: int, *, seed: int | None = None, rank: int = 0, world: int = 1, start: int = 0
    ) -> None:
        self.size, self.batch_size, self.seed, self.rank, self.world = size, batch_size, seed, rank, world
        self.start = start  # the first index, if in order
        self.epoch = 0

    def __len__(self) -> int:
        if self.seed is None:
            return -(-len(range(self.start + self.rank, self.size, self.world)) // self.batch_size)
        return max(1, self.size // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        if self.seed is None:
            own = list(range(self.start + self.rank, self.size, self.world))
            yield from (own[start : start + self.batch_size] for start in range(0, len(own), self.batch_size))
            return
        generator = torch.Generator().manual_seed(mixed(self.seed, self.epoch))
        order = torch.randperm(self.size, generator=generator).tolist()
        for number in range(len(self)):
            batch = order[number * self.batch_size : (number + 1) * self.batch_size]
            part = len(batch) // self.world
            yield batch[self.rank * part : (self.rank + 1) * part]


class Loader:
    """Batches of a dataset: ``(images or features, labels, indices)``.

    Iterating gives batches on the CPU, which workers have read and transformed. `on` gives batches on a device, which
    transforms them itself while the workers read on.
    """

    def __init__(self, dataset: Batched, batch_sampler: Batches, workers: int) -> None:
        self.dataset, self.batch_sampler, self.workers = dataset, batch_sampler, workers

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        return self.on(torch.device("cpu"))

    def part(self, rank: int, world: int) -> "Loader":
        """A loader of every ``world``-th patch from ``rank`` on; for loaders in order."""
        own = self.batch_sampler
        return Loader(self.dataset, Batches(own.size, own.batch_size, rank=rank, world=world), self.workers)

    def between(self, start: int, stop: int) -> "Loader":
        """A loader of the patches in [start, stop); for loaders in order."""
        return Loader(self.dataset, Batches(stop, self.batch_sampler.batch_size, start=start), self.workers)

    def on(self, device: torch.device) -> Iterator[Batch]:
        """The batches on a device, labels and indices on the CPU."""
        here = device.type == "cpu"
        dataset: Any = self.dataset  # DataLoader's annotations, but not its code, need a base class
        collate: Any = dataset.transformed if here else _as_it_is
        batches: DataLoader[Batch] = DataLoader(
            dataset,
            batch_sampler=self.batch_sampler,
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else each pass would draw a number from the generator of dropout
        )
        return iter(batches) if here else (self.dataset.transformed(batch, device) for batch in batches)


def _as_it_is(batch: Batch) -> Batch:
    return batch


def make_loader(
    dataset: Batched,
    batch_size: int,
    *,
    workers: int = 0,
    seed: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Loader:
    """Make a loader of ``(images, labels, indices)``: shuffled by the seed, or in order without one.

    Raises:
        ExampleError: a batch size that the processes cannot share equally.
    """
    size = len(dataset)
    if seed is not None and (batch_size % world or size < world):
        raise ExampleError(
            f"--batch-size {batch_size}: {world} processes share each batch, so give a multiple of {world} "
            "and at least as many patches."
        )
    return Loader(dataset, Batches(size, batch_size, seed=seed, rank=rank, world=world), workers)


def begin_epoch(loader: Loader, epoch: int) -> None:
    """Set the epoch, which changes the order and the augmentation."""
    loader.batch_sampler.epoch = epoch
    loader.dataset.epoch = epoch
