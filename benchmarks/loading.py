"""Images a second: batched reads against opening the file for each image, and drawing synthetic patches.

    python -m benchmarks.loading --images 4000 --workers 0 2
    python -m benchmarks.loading --generate 2000 --processes 1 2

Public notebooks open, index and close `h5py.File` in each ``__getitem__``, which is compared here. Both ways give the
same tensors with the same DataLoader settings. Rounds alternate, so that other load on the machine affects both. After
the first, uncounted round the file is in the page cache, so the reader is measured, not the disk.

``--generate`` times `synthetic.make_synthetic`, files included, with each number of processes in alternating rounds. It
prints ratios to the first, and the CPU time a patch, which hardly depends on other load.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.histopathology.data.dataset import HistoDataset, find_splits
from examples.histopathology.making.synthetic import make_synthetic
from examples.histopathology.making.writing import SplitWriter

BATCH = 32


class OpenPerImage(Dataset[tuple[Tensor, Tensor, int]]):
    """A dataset that opens and closes the file for each image."""

    def __init__(self, path: Path, keys: list[str]) -> None:
        self.path = path
        self.keys = keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        """Image ``(3, 96, 96)`` float32, label, index."""
        with h5py.File(self.path, "r") as file:
            group = file[self.keys[index]]
            image = torch.from_numpy(group["img"][()]).float()
            return image, torch.tensor(float(group["label"][()])), index


def make_split(directory: Path, images: int) -> Path:
    """Write a training split of random pixels, float32."""
    rng = np.random.default_rng(0)
    with SplitWriter(directory, "train") as writer:
        for i in range(images):
            writer.add(rng.random((3, 96, 96), dtype=np.float32), i % 2, [i % 5, 0, 0, 0])
    return directory / "train.h5"


def images_per_second(dataset: Dataset[tuple[Tensor, Tensor, int]], workers: int, images: int) -> float:
    """Images a second over one shuffled epoch, without the start of the workers."""
    loader = DataLoader(
        dataset,
        batch_size=BATCH,
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    if workers:
        next(iter(loader))
    start = time.perf_counter()
    for _ in loader:
        pass
    return images / (time.perf_counter() - start)


def compare(batched: HistoDataset, workers: int, rounds: int) -> None:
    """Time both ways in alternating rounds; print the ratio, then each way's median and range."""
    opening = OpenPerImage(batched.path, [str(key) for key in batched.ids])
    ways = {"batched reads": batched, "open per image": opening}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, dataset in ways.items():
            speeds[name].append(images_per_second(dataset, workers, len(batched)))
    ours, theirs = (statistics.median(speeds[name][1:]) for name in ways)
    print(f"\nworkers {workers}: batched reads are {ours / theirs:.1f} times as fast")
    for name, values in speeds.items():
        counted = values[1:]
        print(f"  {name:15s}{statistics.median(counted):9,.0f} images/s ({min(counted):,.0f}–{max(counted):,.0f})")


def make_patches(patches: int, processes: int) -> tuple[float, float]:
    """Write a synthetic data set of this many training patches; returns patches a second and CPU ms a patch."""
    sizes = {"train": patches, "val": 1, "test": 1}
    with tempfile.TemporaryDirectory() as folder:
        start, busy = time.perf_counter(), cpu_seconds()
        make_synthetic(folder, sizes, dtype="uint8", processes=processes)
        count = sum(sizes.values())
        return count / (time.perf_counter() - start), 1000 * (cpu_seconds() - busy) / count


def cpu_seconds() -> float:
    """CPU seconds of this process and its ended children."""
    return sum(os.times()[:4])


def compare_generation(patches: int, processes: list[int], rounds: int) -> None:
    """Draw patches with each number of processes in alternating rounds; print speeds, ratios and CPU time."""
    runs: dict[int, list[tuple[float, float]]] = {count: [] for count in processes}
    for _ in range(rounds):
        for count in processes:
            runs[count].append(make_patches(patches, count))
    first = statistics.median(speed for speed, _ in runs[processes[0]])
    print(f"\ndrawing {patches:,} synthetic patches, ratio to {processes[0]}")
    for count, measured in runs.items():
        speeds, busy = zip(*measured, strict=True)
        middle = statistics.median(speeds)
        spread = f"({min(speeds):,.0f}–{max(speeds):,.0f})"
        print(f"  processes {count:3d}{middle:9,.0f} patches/s {spread} {middle / first:6.2f}", end="")
        print(f"   {statistics.median(busy):.1f} ms of CPU a patch")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train.h5 (default: random pixels)")
    parser.add_argument("--images", type=int, default=4000, help="number of images to read, or to make (110 kB each)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="numbers of loader processes")
    parser.add_argument("--generate", type=int, metavar="N", help="time the drawing of N synthetic patches instead")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes that draw them")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.generate:
        compare_generation(options.generate, options.processes, options.rounds)
    else:
        compare_reading(options)
    print(f"median (min–max) of {options.rounds} rounds; {machine()}")


def compare_reading(options: argparse.Namespace) -> None:
    """Make data if none is given, and compare at each number of workers."""
    with tempfile.TemporaryDirectory() as folder:
        path = find_splits(options.data)["train"] if options.data else make_split(Path(folder), options.images)
        dataset = HistoDataset(path, limit=options.images)
        for workers in options.workers:
            compare(dataset, workers, options.rounds)
    print(f"\n{len(dataset):,} images, batch {BATCH}")


def machine() -> str:
    """Cores, threads and versions."""
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; "
        f"Python {platform.python_version()}, torch {torch.__version__}, h5py {h5py.__version__}, "
        f"HDF5 {h5py.version.hdf5_version}"
    )


if __name__ == "__main__":
    main()
