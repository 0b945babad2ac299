"""Outputs appear whole or not at all: written under a temporary name beside their place, then renamed."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file; an interrupted write leaves what was at ``path`` before."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file; an interrupted write leaves what was at ``path`` before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing_file(path: Path, shared: bool = False) -> Iterator[Path]:
    """A name to write to, which becomes ``path`` when the block ends without an error: synced, then renamed.

    Args:
        path: the file.
        shared: whether another process, on another machine perhaps, may write the same file now.
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
    """An empty directory to fill, which takes the place of ``folder`` when the block ends without an error."""
    partial, old = (folder.with_name(f"{folder.name}.{kind}") for kind in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rename(old)  # a directory cannot be renamed onto one that holds files
        partial.rename(folder)
    finally:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
