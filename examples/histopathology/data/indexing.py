"""What is known of a challenge file's images without their pixels, kept so that the file opens at once the next time.

Looking at each of 100,000 groups takes a minute. What was found lies in the user's cache, not beside the file: a folder
of data may be read-only, and what lies in it may come from a stranger. An entry holds for the file's path, size, time
of writing and time of change; a file that was written less than two seconds ago gets none, since it could change once
more without its times telling.

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
"""Images from which on an entry is written; fewer are looked at in half a second."""
NO_LABEL = -1
_SETTLED = 2e9  # nanoseconds; the coarsest clock of a file system that is in use ticks every two seconds


@dataclass(frozen=True)
class Columns:
    """A column for each thing known, a row for each image, in the order of the ids.

    Attributes:
        keys: ``(n,)`` bytes.
        ids: ``(n,)`` int64.
        labels: ``(n,)`` int8; `NO_LABEL` where absent.
        centres: ``(n,)`` int64.
        dtypes: ``(n,)`` text.
        offsets: ``(n,)`` int64, see `layout.Row`.
        source: as `layout.read_source`.
        notes: a sentence each.
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
        """Some of the rows."""
        return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in _ARRAYS})


_ARRAYS = ("keys", "ids", "labels", "centres", "dtypes", "offsets")


def stamp(path: Path) -> dict[str, Any]:
    """What an entry holds for: the file by its path, size and times."""
    found = path.stat()
    return {
        "format": FORMAT,
        "path": str(path.resolve()),
        "size": found.st_size,
        "written": found.st_mtime_ns,
        "changed": found.st_ctime_ns,
    }


def read(path: Path) -> Columns | None:
    """The columns of a file that is as it was when they were written; None where there are none."""
    try:
        with np.load(io.BytesIO(_entry(path).read_bytes()), allow_pickle=False) as stored:
            kept = json.loads(str(stored["kept"]))
            if kept["stamp"] != stamp(path):
                return None
            return Columns(**{name: stored[name] for name in _ARRAYS}, source=kept["source"], notes=kept["notes"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None  # no entry, or a damaged one: look at the file itself


def write(path: Path, columns: Columns, before: dict[str, Any]) -> None:
    """Keep the columns, where that is worth it and the file stood still since ``before``, its stamp back then."""
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
        return  # a cache that cannot be written costs time alone


def _entry(path: Path) -> Path:
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    return folder() / f"{digest}.npz"


def folder() -> Path:
    """Where entries lie."""
    given = os.environ.get("HISTOPATHOLOGY_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(given if given else Path(base, "convlora-histopathology")).expanduser()
