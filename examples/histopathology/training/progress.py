"""The progress bar of a pass through the training set."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(console: Console, name: str, total: int) -> Iterator[Callable[[int, float], None]]:
    """A progress bar that disappears at the end; yields a function to call with (images done, loss) after each step."""
    words = TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[note]}")
    columns = (TextColumn(name), BarColumn(), words, TimeRemainingColumn())
    start = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=total, note="")

        def advance(images: int, loss: float) -> None:
            progress.advance(task, images)
            speed = progress.tasks[0].completed / (time.perf_counter() - start)
            progress.update(task, note=f"{speed:.0f} images/s  loss {loss:.3f}")

        yield advance
