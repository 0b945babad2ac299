"""Batches: a split as one method sees it, and which patches each process gets in which order.

Every draw of augmentation is a function of (seed, epoch, patch): not of the batch that a patch is in, nor of the worker
or process that reads it. So a training is the same with any number of workers, goes on after an interruption where it
was, and several processes together see what one would.
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
    """What a `Loader` reads: a dataset that gives whole batches, in two steps."""

    epoch: int

    def __len__(self) -> int:
        """Patches."""

    def __getitem__(self, index: int) -> Sample:
        """One, through both steps."""

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """What is read."""

    def transformed(self, batch: Batch, device: torch.device | None = None) -> Batch:
        """What is made of it, on the device."""


class View:
    """A split's patches through a transform, a batch at a time.

    Args:
        split: a dataset of ``(image, label, index)`` with ``labels`` and ``centres``; its own transform is not used.
        transform: of a batch ``(n, 3, H, W)`` and the draws of its patches.
        seed: of the draws.
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
        """The patches of one batch as they are; DataLoader calls this where it exists."""
        images = torch.from_numpy(self.split.read(indices))
        rows = torch.as_tensor(indices)
        return images, labels_of(self.labels, rows), rows

    def transformed(self, batch: Batch, device: torch.device | None = None) -> Batch:
        """A batch of these patches through the transform, on the device."""
        images, labels, rows = batch
        images = images.to(device, non_blocking=True)
        return self.transform(images, Draws(self.seed, self.epoch, rows.numpy())), labels, rows


def labels_of(labels: Tensor | None, rows: Tensor) -> Tensor:
    """Labels of some patches as floats, NaN where there are none."""
    return torch.full(rows.shape, torch.nan) if labels is None else labels[rows].float()


class Batches(Sampler[list[int]]):
    """Indices of each batch, of which a process gets its part: the parts of all make the batch of one process.

    Shuffled anew for each epoch where a seed is given (the epoch is the sampler's whole state), with full batches
    only: a last batch of one patch would stop BatchNorm in train mode. Else in order, all of them, each process taking
    every n-th index.
    """

    def __init__(
        self, size: int, batch_size: int, *, seed: int | None = None, rank: int = 0, world: int = 1, start: int = 0
    ) -> None:
        self.size, self.batch_size, self.seed, self.rank, self.world = size, batch_size, seed, rank, world
        self.start = start  # in order, the first index of all
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

    Iterated, it gives them on the CPU, where workers transform, too. `on` gives them on a device that does so itself:
    its workers only read, and read on while it works.
    """

    def __init__(self, dataset: Batched, batch_sampler: Batches, workers: int) -> None:
        self.dataset, self.batch_sampler, self.workers = dataset, batch_sampler, workers

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        return self.on(torch.device("cpu"))

    def part(self, rank: int, world: int) -> "Loader":
        """Of a loader in order, every ``world``-th patch from ``rank`` on."""
        own = self.batch_sampler
        return Loader(self.dataset, Batches(own.size, own.batch_size, rank=rank, world=world), self.workers)

    def between(self, start: int, stop: int) -> "Loader":
        """Of a loader in order, the patches from ``start`` up to and without ``stop``."""
        return Loader(self.dataset, Batches(stop, self.batch_sampler.batch_size, start=start), self.workers)

    def on(self, device: torch.device) -> Iterator[Batch]:
        """The batches on a device, labels and indices on the CPU."""
        here = device.type == "cpu"
        dataset: Any = self.dataset  # DataLoader's annotations ask for a base class, its code does not
        collate: Any = dataset.transformed if here else _as_it_is
        batches: DataLoader[Batch] = DataLoader(
            dataset,
            batch_sampler=self.batch_sampler,
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else each pass would take a number from the one that dropout draws from
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
    """Batches of ``(images, labels, indices)``; shuffled by the seed for training, without one in order.

    Raises:
        ExampleError: a batch that the processes cannot share equally.
    """
    size = len(dataset)
    if seed is not None and (batch_size % world or size < world):
        raise ExampleError(
            f"--batch-size {batch_size}: {world} processes share each batch, so give a multiple of {world} "
            "and at least as many patches."
        )
    return Loader(dataset, Batches(size, batch_size, seed=seed, rank=rank, world=world), workers)


def begin_epoch(loader: Loader, epoch: int) -> None:
    """Another order, and other draws of augmentation."""
    loader.batch_sampler.epoch = epoch
    loader.dataset.epoch = epoch
