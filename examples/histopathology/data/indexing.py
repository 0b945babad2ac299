"""A cache of all that is known of a challenge file's images without their pixels, so that the file opens at once.

Reading each of 100,000 groups takes a minute. The cache lies in the user's cache folder, not beside the file: a data
folder may be read-only, or its contents may come from a stranger. An entry is valid while the file's path, size, time
of writing and time of change stay the same. A file written less than two seconds ago gets no entry, since it could
change again without a change of its times.

``HISTOPATHOLOGY_CACHE`` names another folder; the default is ``convlora-histopathology`` in ``XDG_CACHE_HOME`` or
``~/.cache``. Entries may be deleted at any time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..files import write_bytes

FORMAT = 1
WORTH = 1000
"""The fewest images for which an entry is written; fewer are read in half a second."""
NO_LABEL = -1
_SETTLED = 2e9  # nanoseconds; the coarsest clock of a file system in use ticks every two seconds


@dataclass(frozen=True)
class Columns:
    """One row for each image, in the order of the ids.

    Attributes:
        keys: ``(n,)`` bytes.
        ids: ``(n,)`` int64.
        labels: ``(n,)`` int8; `NO_LABEL` where absent.
        centres: ``(n,)`` int64.
        dtypes: ``(n,)`` text.
        offsets: ``(n,)`` int64, see `layout.Row`.
        source: see `layout.read_source`.
        notes: remarks on the file, a sentence each.
    """

    keys: npt.NDArray[np.bytes_]
    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int8]
    centres: npt.NDArray[np.int64]
    dtypes: npt.NDArray[np.str_]
    offsets: npt.NDArray[np.int64]
    source: str | None
    notes: list[str]

    def chosen(self, rows: npt.NDArray[np.int64]) -> Columns:
        """These rows alone."""
        return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in _ARRAYS})


_ARRAYS = ("keys", "ids", "labels", "centres", "dtypes", "offsets")


def stamp(path: Path) -> dict[str, Any]:
    """The file's path, size and times, for which an entry is valid."""
    found = path.stat()
    return {
        "format": FORMAT,
        "path": str(path.resolve()),
        "size": found.st_size,
        "written": found.st_mtime_ns,
        "changed": found.st_ctime_ns,
    }


def read(path: Path) -> Columns | None:
    """The cached columns of a file; None without an entry, or where the file has changed."""
    try:
        with np.load(io.BytesIO(_entry(path).read_bytes()), allow_pickle=False) as stored:
            kept = json.loads(str(stored["kept"]))
            if kept["stamp"] != stamp(path):
                return None
            return Columns(**{name: stored[name] for name in _ARRAYS}, source=kept["source"], notes=kept["notes"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None  # no entry, or a damaged one: read the file itself


def write(path: Path, columns: Columns, before: dict[str, Any]) -> None:
    """Cache the columns, if there are enough images and the file's stamp is still ``before``."""
    now = time.time_ns()
    is_settled = before == stamp(path) and max(before["written"], before["changed"]) < now - _SETTLED
    if len(columns.ids) < WORTH or not is_settled:
        return
    kept = json.dumps({"stamp": before, "source": columns.source, "notes": columns.notes})
    body = io.BytesIO()
    np.savez(body, kept=np.array(kept), **{name: getattr(columns, name) for name in _ARRAYS})
    try:
        write_bytes(_entry(path), body.getvalue())
    except OSError:
        return  # without a cache the next opening only takes longer


def _entry(path: Path) -> Path:
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    return folder() / f"{digest}.npz"


def folder() -> Path:
    """The folder of the entries."""
    given = os.environ.get("HISTOPATHOLOGY_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(given if given else Path(base, "convlora-histopathology")).expanduser()
