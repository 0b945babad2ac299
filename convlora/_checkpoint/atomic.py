"""Files that are replaced whole or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file, which replaces ``path`` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with suppress(OSError):  # the temporary file was renamed, or the block's error is being raised
            temporary.unlink(missing_ok=True)


@contextmanager
def put_back(files: Iterable[Path]) -> Iterator[None]:
    """If the block fails, write the old content back to these small files."""
    before = {file: file.read_bytes() if file.is_file() else None for file in files}
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for file, content in before.items():
                if content is None:
                    file.unlink(missing_ok=True)
                elif not file.is_file() or file.read_bytes() != content:
                    with replacing(file) as temporary:
                        temporary.write_bytes(content)
        raise


def tidy(path: Path, names: Collection[str]) -> None:
    """Remove temporary files that killed saves left for files of these names; those of running saves are younger."""
    with suppress(OSError):
        for file in path.glob(f".*.{'[0-9a-f]' * 32}"):
            name = file.name[1:-33]
            if name in names and time.time() - file.stat().st_mtime > _ABANDONED:
                file.unlink()


_ABANDONED = 3600.0
"""Age in seconds from which a temporary file belongs to no running save."""
