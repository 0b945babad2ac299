"""Write files whole or not at all: under a temporary name in the same folder, then renamed."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file; an interrupted write leaves the earlier file at ``path``."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file; an interrupted write leaves the earlier file at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing_file(path: Path, shared: bool = False) -> Iterator[Path]:
    """Give a temporary name to write to, which is synced and renamed to ``path`` when the block ends without an error.

    Args:
        path: the file.
        shared: whether another process, perhaps on another machine, may write the same file at the same time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12] + '.' if shared else ''}partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing_directory(folder: Path) -> Iterator[Path]:
    """Give an empty directory to fill, which replaces ``folder`` when the block ends without an error."""
    partial, old = (folder.with_name(f"{folder.name}.{kind}") for kind in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rename(old)  # a directory cannot be renamed to the name of one that holds files
        partial.rename(folder)
    finally:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
