"""A synthetic data set in the challenge's layout, for use without the challenge's data.

It shows that the pipeline works; **it is no evidence about Camelyon17**. Each file says so in its root attribute
``source``, and ``synthetic.json`` beside the files says how they were made.

A patch is `tissue` under the light, lens and compression of one of the `hospitals`, by the Beer-Lambert law with two
stains (see `stain`). Worker processes import this module, so it must not import torch.
"""

from __future__ import annotations

import io
import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.ndimage import gaussian_filter

from ..data.layout import PATCH, SPLITS
from ..data.stain import intensity
from ..errors import ExampleError
from ..files import write_text
from .hospitals import Slide, choose_slide, spread
from .tissue import Tissue, without_margin
from .writing import SplitWriter, refuse_to_overwrite

VERSION = 2
SOURCE = "synthetic data set, no real tissue"
NOTE = "synthetic.json"

Progress = Callable[[int], None]
Job = tuple[int, str, int]
Row = tuple[npt.NDArray[np.uint8], int, npt.NDArray[np.int64]]

_CHUNK = 32
_FEWEST_FOR_A_POOL = 300


@dataclass(frozen=True)
class Patch:
    """One rendered patch.

    Attributes:
        image: ``(3, 96, 96)`` uint8.
        label: 1 if `tumour` reaches into the central 32×32, else 0.
        metadata: ``(4,)`` int64: centre, slide, x, y.
        tumour: ``(96, 96)`` bool, where the tumour is.
    """

    image: npt.NDArray[np.uint8]
    label: int
    metadata: npt.NDArray[np.int64]
    tumour: npt.NDArray[np.bool_]


def make_synthetic(
    directory: str | os.PathLike[str],
    sizes: dict[str, int],
    seed: int = 0,
    dtype: str = "float32",
    progress: Progress | None = None,
    processes: int | None = None,
) -> Path:
    """Write ``train.h5``, ``val.h5``, ``test.h5`` and, last, ``synthetic.json``; returns the note's path.

    Files that an earlier call made with the same arguments are kept. The bits depend on the seed alone, not on the
    number of processes. A script that calls this needs ``if __name__ == "__main__":``, since workers are spawned.

    Args:
        directory: made if absent.
        sizes: number of patches of each of the three splits.
        seed: 0 or more.
        dtype: stored type of ``img``: "float32", "float16", "float64" or "uint8".
        progress: called with the number of patches done so far, over all splits.
        processes: number of processes; None for all cores, 1 to render in this process.

    Raises:
        ExampleError: sizes, seed or dtype out of range; files of another origin in the folder; a full disk.
    """
    folder = Path(directory)
    note = _note(sizes, seed, dtype)
    for split in SPLITS:
        refuse_to_overwrite(folder / f"{split}.h5", SOURCE)
    path = folder / NOTE
    if _is_complete(path, note):
        return path
    path.unlink(missing_ok=True)
    jobs = [(seed, split, index) for split in SPLITS for index in range(sizes[split])]
    done = 0
    # Closed even after an error: an interrupted run must not leave workers rendering.
    with closing(_render_all(jobs, processes)) as patches:
        for split in SPLITS:
            with SplitWriter(folder, split, dtype, SOURCE) as writer:
                for image, label, metadata in islice(patches, sizes[split]):
                    writer.add(image, label, metadata)
                    done += 1
                    if progress is not None:
                        progress(done)
    write_text(path, json.dumps(note, indent=2) + "\n")
    return path


def render_patch(seed: int, split: str, index: int) -> Patch:
    """Render patch `index` of a split; the patch depends on the three arguments alone."""
    code = SPLITS.index(split)  # seeds the patch, so another order of SPLITS would give other patches
    rng = np.random.default_rng([seed, code, index, 0])
    slide = choose_slide(rng, seed, split)
    label = _label(seed, code, index)
    tissue = Tissue(rng, slide.microns, slide.tumour, slide.tumour_eosin)
    tumour = tissue.grow(label)
    image = _photograph(rng, tissue, slide)
    position = rng.integers(0, 1000, 2) * PATCH
    metadata = np.array([slide.centre, slide.number, *position], np.int64)
    return Patch(image, label, metadata, without_margin(tumour))


def _photograph(rng: np.random.Generator, tissue: Tissue, slide: Slide) -> npt.NDArray[np.uint8]:
    """Pass light through the stains and a lens that is not always in focus onto a sensor, and store it as JPEG."""
    haematoxylin, eosin = (spread(rng)[:, None] * slide.stains).astype(np.float32)
    # Not as a matrix product: its threads would compete for the cores with the other workers.
    density = np.multiply.outer(haematoxylin, tissue.haematoxylin) + np.multiply.outer(eosin, tissue.eosin)
    light = intensity(density, slide.white.astype(np.float32)[:, None, None])
    blur = slide.blur * rng.uniform(0.85, 1.2) + (rng.uniform(0.3, 1.0) if rng.random() < 0.08 else 0.0)
    soft = gaussian_filter(light, (0, blur, blur), truncate=3)
    sharp = np.ascontiguousarray(without_margin(soft))
    ramp = np.linspace(-0.5, 0.5, PATCH, dtype=np.float32)
    down, right = rng.normal(0, 0.02, 2).astype(np.float32)
    sharp *= 1 + down * ramp[:, None] + right * ramp
    sharp += np.float32(0.008) * rng.standard_normal((PATCH, PATCH), np.float32)
    pixels = np.rint(np.clip(sharp, 0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(_jpeg(pixels.transpose(1, 2, 0), slide.jpeg).transpose(2, 0, 1))


def _jpeg(pixels: npt.NDArray[np.uint8], quality: int) -> npt.NDArray[np.uint8]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def _label(seed: int, split: int, index: int) -> int:
    # Each pair of neighbours holds one of each label, in random order, so a split is balanced at any size.
    first = int(np.random.default_rng([seed, split, index // 2, 1]).integers(2))
    return first ^ (index % 2)


def _render_chunk(jobs: Sequence[Job]) -> list[Row]:
    return [(p.image, p.label, p.metadata) for p in (render_patch(*job) for job in jobs)]


def _render_all(jobs: Sequence[Job], processes: int | None) -> Generator[Row, None, None]:
    """Rows in the order of the jobs; too few for starting workers are rendered in this process."""
    workers = _cores() if processes is None else processes
    if workers <= 1 or (processes is None and len(jobs) < _FEWEST_FOR_A_POOL):
        yield from (row for job in jobs for row in _render_chunk([job]))
        return
    chunks = [jobs[i : i + _CHUNK] for i in range(0, len(jobs), _CHUNK)]
    # Spawned, not forked: the caller has loaded torch, whose threads do not survive a fork.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            yield from _in_order(pool, chunks, ahead=4 * workers)
        except BrokenProcessPool as error:
            raise ExampleError(
                "the processes that draw synthetic patches ended early: out of memory, or a script without "
                "`if __name__ == '__main__':` around its work. processes=1 renders without other processes."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, chunks: Sequence[Sequence[Job]], ahead: int) -> Iterator[Row]:
    # Only a few chunks ahead: finished chunks would fill the memory if the disk is slower than the workers.
    waiting: deque[Future[list[Row]]] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(_render_chunk, chunk))
        if len(waiting) >= ahead:
            yield from waiting.popleft().result()
    while waiting:
        yield from waiting.popleft().result()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _note(sizes: dict[str, int], seed: int, dtype: str) -> dict[str, Any]:
    if set(sizes) != set(SPLITS) or min(sizes.values()) < 1:
        raise ExampleError(f"sizes={sizes}: give a number of patches, 1 or more, for each of {', '.join(SPLITS)}.")
    if seed < 0:
        raise ExampleError(f"seed={seed}: give 0 or more.")
    return {
        "synthetic": True,
        "source": SOURCE,
        "warning": "Rendered, not photographed: no evidence about Camelyon17 or any tissue.",
        "version": VERSION,
        "seed": seed,
        "sizes": {split: sizes[split] for split in SPLITS},
        "dtype": dtype,
    }


def _is_complete(path: Path, note: dict[str, Any]) -> bool:
    try:
        same = json.loads(path.read_text(encoding="utf-8")) == note
    except (FileNotFoundError, ValueError):
        return False
    return same and all((path.parent / f"{split}.h5").exists() for split in SPLITS)
