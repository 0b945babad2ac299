"""The WILDS Camelyon17 folder as `Rows`: ``metadata.csv`` and a PNG for each patch.

The table's first column, without a name, is the index; ``patient`` (three digits with leading zeros), ``node``,
``x_coord`` and ``y_coord`` name the picture; ``tumor`` is the label, ``center`` the hospital. As in the WILDS package,
centre 1 is validation and centre 2 test, whatever ``split`` says, and the other centres' rows of ``split`` 0 are
training data. Their rows of ``split`` 1, WILDS's validation *within* the training hospitals, are left out.

P. W. Koh et al. WILDS: a benchmark of in-the-wild distribution shifts. ICML 2021, arXiv:2012.07421.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import numpy.typing as npt

from ..errors import ExampleError
from .layout import PATCH, SPLITS
from .pictures import PictureError, opened_path
from .rows import Ids, Rows, choose

TABLE = "metadata.csv"
COLUMNS = ("patient", "node", "x_coord", "y_coord", "tumor", "center", "split")
CENTRES = {1: "val", 2: "test"}
MOST_BYTES = 32 * 2**20
"""The most bytes of the table, which takes up to twenty times as much memory."""
_LONGEST = 4096
"""The most characters of a line."""
_MOST_PAIRS = 1000
_SIZE = (PATCH, PATCH)
_OWN_SPLITS = {0: "train", 1: None}
_LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "": None}


class WildsRows(Rows):
    """One split of the folder.

    Args:
        path: ``metadata.csv``.
        split: "train", "val" or "test".
        limit: see `rows.choose`.

    Raises:
        ExampleError: a column is missing; a row is faulty (the error names the first such line); the split has no
            row; a patient's folder of pictures is missing.
    """

    layout = "WILDS Camelyon17 folder"

    def __init__(self, path: Path, split: str, limit: int | None = None) -> None:
        super().__init__(path)
        table = _Table(path)
        lines = table.lines_of(split)
        if not lines:
            raise ExampleError(f"{path}: no row of the {split} split. {_rule(split)}")
        ids = table.ids(lines)
        order = np.argsort(ids)
        self.ids = ids[order][choose(len(ids), limit, path)]
        entries = [table.entry(lines[i]) for i in order[choose(len(ids), limit, path)]]
        self.labels = [entry.label for entry in entries]
        self.centres = np.array([entry.centre for entry in entries], np.int64)
        self._names = [entry.picture for entry in entries]
        self.slides = [name.split("/")[1] for name in self._names]  # patient and node: one slide
        self.patients = [slide.partition("_node_")[0] for slide in self.slides]
        _check_folders(path, self._names)
        self.dtypes["uint8"] = len(entries)
        self.shape = (*_SIZE, 3)
        left_out = len(table.lines_of(None))
        if split == "train" and left_out:
            self.notes = [f"{left_out:,} rows of split 1 left out: WILDS's validation within the training hospitals"]

    def read(self, index: int, out: npt.NDArray[np.float32]) -> None:
        """Read one image into `out`, channel first."""
        path = self.path.parent / self._names[index]
        try:
            with opened_path(path, most=PATCH * PATCH) as image:
                if image.format != "PNG" or image.size != _SIZE:
                    raise PictureError(f"{image.format}, {image.width}×{image.height} pixels; WILDS patches are 96×96")
                pixels = np.asarray(image.convert("RGB"))
        except FileNotFoundError as error:
            raise ExampleError(
                f"{path}: no such picture, but {self.path} lists it. Unpack the archive again."
            ) from error
        except (PictureError, OSError) as error:
            raise ExampleError(f"{path}: cannot be read as a PNG ({error}). Unpack the archive again.") from error
        np.divide(pixels.transpose(2, 0, 1), np.float32(255), out=out)

    def name(self, index: int) -> str:
        """The image's file."""
        return self._names[index]


class _Entry(NamedTuple):
    picture: str
    label: int | None
    centre: int


class _Table:
    """The table's lines as text; a line is split into cells when it is asked for."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ExampleError(f"{path}: no such file. A WILDS folder holds metadata.csv and patches/.")
        if path.stat().st_size > MOST_BYTES:
            raise ExampleError(
                f"{path}: {path.stat().st_size:,} bytes; {MOST_BYTES:,} are read at most, twice the size of WILDS's "
                "table. Unpack the archive again."
            )
        self.path = path
        self._lines: list[str] = []
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.reader(self._kept(file))
                header = next(reader, [])
                self._columns = self._find_columns(header)
                self._splits = self._read_splits(reader, len(header))
        except (OSError, csv.Error, UnicodeDecodeError) as error:
            raise ExampleError(f"{path}: cannot be read as a table ({error}). Unpack the archive again.") from error

    def _kept(self, file: TextIO) -> Iterator[str]:
        """Yield and keep each line of the file; a line that is too long, or a quote without its end, is an error."""
        while line := file.readline(_LONGEST + 1):
            if len(line) > _LONGEST or line.count('"') % 2:
                what = f"longer than {_LONGEST:,} characters" if len(line) > _LONGEST else "a quote without its end"
                raise ExampleError(f"{self.path}, line {len(self._lines) + 1}: {what}. Unpack the archive again.")
            self._lines.append(line)
            yield line

    def _find_columns(self, header: list[str]) -> list[int]:
        missing = [name for name in COLUMNS if name not in header]
        if missing:
            raise ExampleError(
                f"{self.path}: no column {', '.join(missing)} (found: {', '.join(header)[:200]}). WILDS Camelyon17 has "
                f"an index, then {', '.join(COLUMNS[:5])}, slide, center, split."
            )
        twice = [name for name in COLUMNS if header.count(name) > 1]
        if twice:
            raise ExampleError(f"{self.path}: two columns {twice[0]}. Keep one.")
        return [header.index(name) for name in COLUMNS]

    def lines_of(self, split: str | None) -> list[int]:
        """The line numbers of a split; those of no split for None."""
        return [line for line, each in enumerate(self._splits) if each == split]

    def splits(self) -> set[str | None]:
        """The splits that have lines."""
        return set(self._splits)

    def ids(self, lines: list[int]) -> Ids:
        """The index of each of these lines; raises if two are the same."""
        ids = np.array([self._whole(line, self._cells(line)[0], "the index") for line in lines], np.int64)
        values, counts = np.unique(ids, return_counts=True)
        if (counts > 1).any():
            raise ExampleError(f"{self.path}: {counts.max()} rows have the index {values[counts.argmax()]}. Keep one.")
        return ids

    def entry(self, line: int) -> _Entry:
        """The picture, label and centre of a line."""
        cells = self._cells(line)
        patient, node, x, y, tumour, centre, _ = (cells[column].strip() for column in self._columns)
        if not (patient.isascii() and patient.isdecimal() and len(patient) < 10):  # it becomes part of a path
            raise self._fault(line, f"patient is {patient[:40]!r}; it must be three digits")
        where = f"patient_{patient}_node_{self._whole(line, node, 'node')}"
        x, y = (str(self._whole(line, text, name)) for text, name in ((x, "x_coord"), (y, "y_coord")))
        if tumour not in _LABELS:
            raise self._fault(line, f"tumor is {tumour[:40]!r}; it must be 0 or 1, or empty in the test split")
        picture = f"patches/{where}/patch_{where}_x_{x}_y_{y}.png"
        return _Entry(picture, _LABELS[tumour], self._whole(line, centre, "center"))

    def _cells(self, line: int) -> list[str]:
        return next(csv.reader([self._lines[line + 1]]))

    def _read_splits(self, rows: Iterator[list[str]], width: int) -> list[str | None]:
        centre, split = self._columns[-2:]
        known: dict[tuple[str, str], str | None] = {}
        splits = []
        for line, cells in enumerate(rows):
            if len(cells) != width:
                raise self._fault(line, f"{len(cells)} cells, {width} columns")
            pair = cells[centre], cells[split]
            if pair not in known:
                if len(known) == _MOST_PAIRS:
                    raise self._fault(line, f"more than {_MOST_PAIRS:,} different pairs of center and split")
                known[pair] = self._split(line, *pair)
            splits.append(known[pair])
        return splits

    def _split(self, line: int, centre: str, split: str) -> str | None:
        by_centre = CENTRES.get(self._whole(line, centre, "center"))
        if by_centre is not None:
            return by_centre
        own = self._whole(line, split, "split")
        if own not in _OWN_SPLITS:
            raise self._fault(line, f"split is {own}; WILDS has 0 (train) and 1 (validation in the same hospitals)")
        return _OWN_SPLITS[own]

    def _whole(self, line: int, text: str, column: str) -> int:
        try:
            value = float(text)  # pandas writes 2.0 where a column once held a gap
            if value.is_integer() and abs(value) < 2**53 and text.isascii() and "_" not in text:
                return int(value)
        except ValueError:
            pass
        raise self._fault(line, f"{column} is {text[:40]!r}, not a whole number")

    def _fault(self, line: int, what: str) -> ExampleError:
        return ExampleError(f"{self.path}, line {line + 2}: {what}.")


def is_wilds(folder: Path) -> bool:
    """Whether a folder holds WILDS's table."""
    return (folder / TABLE).is_file()


def find(folder: Path) -> dict[str, Path]:
    """The table's path for each split that it has rows of."""
    splits = _Table(folder / TABLE).splits()
    return {split: folder / TABLE for split in SPLITS if split in splits}


def _rule(split: str) -> str:
    centres = {name: centre for centre, name in CENTRES.items()}
    return (
        f"It is center {centres[split]}."
        if split in centres
        else "It is split 0 of the centers that are neither 1 nor 2."
    )


def _check_folders(path: Path, names: list[str]) -> None:
    # Only the folders are checked: half a million pictures would take minutes on a slow disk.
    for name in sorted({name.rpartition("/")[0] for name in names}):
        if not (path.parent / name).is_dir():
            patient = name.split("_")[1]
            lost = " Were the patient's leading zeros lost (004 became 4)?" if len(patient) < 3 else ""
            raise ExampleError(f"{path.parent / name}: no such folder, but {path.name} lists pictures in it.{lost}")
