"""A contact sheet of synthetic patches beside real tissue, from the user's own pictures.

No picture comes with this example. Without the user's pictures, scikit-image's is shown, which is not H&E: its brown is
DAB, the stain of an antibody.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image

from ..data.layout import PATCH
from ..data.rgb import read_picture, resized
from ..data.stain import Floats
from ..errors import ExampleError
from ..files import write_bytes
from ..making.hospitals import HOSPITALS
from ..making.slides import SUFFIXES, is_tissue
from ..making.synthetic import Patch, render_patch
from . import figures

Bytes = npt.NDArray[np.uint8]

TITLE = "Synthetic patches (drawn by a program; frame: label 1)"
_TRIES = 400


def make_sheet(
    pictures: Path | None, columns: int = 8, patch: int = PATCH, seed: int = 0, bare: bool = False
) -> Figure:
    """Rows of synthetic patches, one for each centre, above a row of random tissue patches of each picture.

    Args:
        pictures: a picture or a folder of pictures; None for scikit-image's picture, if installed.
        columns: patches in a row.
        patch: side of a patch in the pictures' pixels, which is scaled to 96; 384 scales a picture of 0.25 µm a pixel
            to the synthetic patches' 1 µm.
        seed: seed of the synthetic patches and of the choice of tissue patches.
        bare: whether to show the synthetic patches alone.

    Raises:
        ExampleError: no picture; a picture that cannot be read, or is too small or nearly empty; no scikit-image.
    """
    rows, framed, titles = _synthetic_rows(columns, seed)
    if not bare:
        for name, picture in _pictures(pictures):
            rows.append(_tissue(picture, name, columns, patch, seed))
            framed.append([False] * columns)
            titles.append(name)
    return figures.sheet(rows, titles, framed, TITLE if bare else f"{TITLE}, then real pictures")


def write_sheet(figure: Figure, out: Path, colours: int | None = None) -> None:
    """Write the figure as PNG, with a palette of ``colours`` colours for a small file."""
    content = figures.as_png(figure, dpi=100)
    if colours is not None:
        stream = io.BytesIO()
        Image.open(io.BytesIO(content)).convert("RGB").quantize(colours, kmeans=3).save(stream, "PNG", optimize=True)
        content = stream.getvalue()
    write_bytes(out, content)


def _synthetic_rows(columns: int, seed: int) -> tuple[list[Floats], list[list[bool]], list[str]]:
    rows, framed, titles = [], [], []
    for centre, hospital in sorted(HOSPITALS.items()):
        patches: list[Patch] = []
        index = 0
        while len(patches) < columns:
            patch = render_patch(seed, hospital.split, index)
            if patch.metadata[0] == centre:
                patches.append(patch)
            index += 1
        rows.append(np.stack([patch.image.transpose(1, 2, 0) for patch in patches]) / np.float32(255))
        framed.append([bool(patch.label) for patch in patches])
        titles.append(f"centre {centre}\n({hospital.split})")
    return rows, framed, titles


def _pictures(where: Path | None) -> list[tuple[str, Bytes]]:
    if where is None:
        return [("scikit-image\nIHC, not H&E", _from_scikit_image())]
    if where.is_dir():
        paths = sorted(path for path in where.iterdir() if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise ExampleError(f"{where}: no picture here. PNG, JPEG, TIFF and SVS are read.")
        return [(path.stem, read_picture(path)) for path in paths]
    return [(where.stem, read_picture(where))]


def _from_scikit_image() -> Bytes:
    try:
        from skimage.data import immunohistochemistry
    except ImportError as error:
        raise ExampleError(
            "no pictures to show beside the synthetic patches: give --pictures with a folder of H&E pictures, or "
            "`pip install scikit-image` for its picture."
        ) from error
    return np.asarray(immunohistochemistry(), np.uint8)


def _tissue(picture: Bytes, name: str, count: int, patch: int, seed: int) -> Floats:
    """Random patches that hold tissue, ``(count, 96, 96, 3)`` in [0, 1]."""
    height, width = picture.shape[:2]
    if min(height, width) < patch:
        raise ExampleError(f"{name}: {width}×{height} pixels hold no patch of {patch}×{patch}; give a smaller --patch.")
    rng = np.random.default_rng(seed)
    found: list[Bytes] = []
    for y, x in rng.integers(0, (height - patch + 1, width - patch + 1), (_TRIES, 2)).tolist():
        pixels = picture[y : y + patch, x : x + patch]
        if is_tissue(pixels):
            found.append(resized(pixels))
        if len(found) == count:
            share: Floats = np.stack(found) / np.float32(255)
            return share
    raise ExampleError(f"{name}: {len(found)} of {_TRIES} places hold tissue; {count} are needed. Leave it out.")
