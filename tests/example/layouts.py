"""The three layouts, written as their documentation says, sharing nothing with the readers."""

from __future__ import annotations

import csv
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

CENTRES = {"train": (0, 3, 4), "val": (1,), "test": (2,)}
PCAM = {"train": "train", "val": "valid", "test": "test"}


def pixels(seed: int, label: int) -> np.ndarray:
    """``(96, 96, 3)`` uint8; the centre of a patch with label 1 is brighter in red."""
    image = np.random.default_rng(seed).integers(76, 179, (96, 96, 3), dtype=np.uint8)
    image[32:64, 32:64, 0] += np.uint8(64 * label)
    return image


def write_challenge(
    folder: Path, sizes: dict[str, int], dtype: str = "float32", *, test_labels: bool = True, scrambled: bool = True
) -> Path:
    """One group per image, keys written (and listed) in a random order."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in sizes.items():
        keys = np.random.default_rng(7).permutation(size) if scrambled else np.arange(size)
        with h5py.File(folder / f"{split}.h5", "w", track_order=scrambled) as file:
            for key in keys.tolist():
                group = file.create_group(str(key))
                image = pixels(key, key % 2).transpose(2, 0, 1)
                group["img"] = image if dtype == "uint8" else (image / 255).astype(dtype)
                if test_labels or split != "test":
                    group["label"] = key % 2
                group["metadata"] = np.array([CENTRES[split][key % len(CENTRES[split])], 9, 8, 7])
    return folder


def write_pcam(folder: Path, sizes: dict[str, int], *, test_labels: bool = True) -> Path:
    """Two files a split: ``x`` (N, 96, 96, 3) uint8 and ``y`` (N, 1, 1, 1)."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in sizes.items():
        stem = folder / f"camelyonpatch_level_2_split_{PCAM[split]}"
        with h5py.File(f"{stem}_x.h5", "w") as file:
            file["x"] = np.stack([pixels(i, i % 2) for i in range(size)])
        if test_labels or split != "test":
            with h5py.File(f"{stem}_y.h5", "w") as file:
                file["y"] = np.array([i % 2 for i in range(size)], np.uint8).reshape(-1, 1, 1, 1)
    return folder


def wilds_rows(sizes: dict[str, int]) -> list[dict[str, object]]:
    """The table, and at its end two rows of the validation within the training hospitals."""
    rows: list[dict[str, object]] = []
    for split, size in (*sizes.items(), ("id_val", 2)):
        for i in range(size):
            centre = CENTRES.get(split, (3,))[i % len(CENTRES.get(split, (3,)))]
            place = {"patient": f"{centre * 20 + 4:03d}", "node": centre % 5, "x_coord": 100 + i, "y_coord": 7}
            if split == "id_val":
                place["y_coord"] = 8
            told = {"tumor": i % 2, "slide": centre * 10, "center": centre, "split": int(split == "id_val")}
            rows.append({"": len(rows), **place, **told})
    return rows


def write_wilds(folder: Path, sizes: dict[str, int]) -> Path:
    """``metadata.csv``, rows in a random order, and a PNG with an alpha channel for each."""
    rows = wilds_rows(sizes)
    for row in rows:
        where = f"patient_{row['patient']}_node_{row['node']}"
        name = f"patch_{where}_x_{row['x_coord']}_y_{row['y_coord']}.png"
        (folder / "patches" / where).mkdir(parents=True, exist_ok=True)
        opaque = np.full((96, 96, 1), 255, np.uint8)
        image = np.concatenate([pixels(int(row[""]), int(row["tumor"])), opaque], 2)
        Image.fromarray(image).save(folder / "patches" / where / name)
    write_table(folder, [rows[i] for i in np.random.default_rng(1).permutation(len(rows))])
    return folder


def write_table(folder: Path, rows: list[dict[str, object]]) -> None:
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
