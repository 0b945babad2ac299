"""Digests of a split's contents: each image is read once before anything is trained.

A file's name, size and times do not identify its contents: a rewritten file may keep them. Files of an earlier run
(features, checkpoints, results) are therefore identified by the SHA-256 of every image as float32 in [0, 1], of the
ids, the labels and the centres. The same pass finds pixels that are not finite or out of range before they cost a
training, and images that are in two splits.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from ..data.dataset import HistoDataset
from ..training.processes import Job

Images = npt.NDArray[np.uint64]
"""The digest of each image, ``(n, 4)``."""

_CHUNK = 32
_seen: WeakKeyDictionary[HistoDataset, Images] = WeakKeyDictionary()


def look(splits: Mapping[str, HistoDataset], job: Job) -> None:
    """Read every image of the splits, in the first process on behalf of all.

    Raises:
        ExampleError: pixels that cannot be read, are not finite, or lie outside [0, 1].
    """
    job.console.print(f"checking all {sum(map(len, splits.values())):,} images", highlight=False)
    found = job.first_decides(lambda: {name: images_of(split) for name, split in splits.items()})
    for name, split in splits.items():
        _seen[split] = found[name]


def images_of(split: HistoDataset) -> Images:
    """The digest of each image of a split, ``(n, 4)``; the images are read unless this process has done so.

    Raises:
        ExampleError: as `look`.
    """
    if split not in _seen:
        starts = range(0, len(split), _CHUNK)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            parts = pool.map(lambda start: _digests(split, range(start, min(start + _CHUNK, len(split)))), starts)
            _seen[split] = np.frombuffer(b"".join(parts), np.uint64).reshape(-1, 4)
    return _seen[split]


def know(split: HistoDataset, images: Images) -> None:
    """Take over the digests of a split from another process that has read it."""
    _seen[split] = images


def digest_of(split: HistoDataset) -> str:
    """The size of a split and a digest of all data that a training uses: pixels, ids, labels, centres."""
    labels = torch.full((len(split),), -1) if split.labels is None else split.labels
    digest = hashlib.sha256(images_of(split).tobytes())
    for column in (torch.as_tensor(split.ids), labels, torch.as_tensor(split.centres)):
        digest.update(column.to(torch.int64).numpy().tobytes())
    return f"{len(split)} patches, {digest.hexdigest()[:16]}"


def digest_of_file(path: Path) -> str:
    """A file's name and digest; the name alone if there is no such file."""
    if not path.is_file():
        return path.name
    found = path.stat()
    return f"{path.name}, {_file_digest(path, found.st_size, found.st_mtime_ns, found.st_ctime_ns)}"


@functools.lru_cache
def _file_digest(path: Path, *stamp: int) -> str:
    """The file's digest, computed once in a process while size and times stay the same."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()[:16]


def _digests(split: HistoDataset, indices: Iterable[int]) -> bytes:
    return b"".join(hashlib.sha256(image).digest() for image in split.read(list(indices)))
