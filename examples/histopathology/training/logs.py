"""Logs of a training: a CSV file, TensorBoard's files if it is installed, and experiment trackers.

All are written from the checkpoint's history, so they never miss or repeat an epoch.
"""

import csv
import dataclasses
import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import write_text
from .trackers import TrackedRun


class Log:
    """The log of one training under ``folder``: ``NAME.csv``, and the folder ``NAME`` for TensorBoard.

    Args:
        folder: folder, made at the first write.
        name: the training's name.
        history: epochs of an earlier run.
        tracked: the training's run in experiment trackers, see `trackers`.
    """

    def __init__(self, folder: Path, name: str, history: Sequence[Any] = (), tracked: TrackedRun | None = None) -> None:
        self.tracked = tracked
        self._csv = folder / f"{name}.csv"
        shutil.rmtree(folder / name, ignore_errors=True)
        self._board = _tensorboard(folder / name)
        for number, epoch in enumerate(history):
            self._scalars(number, epoch)

    def write(self, history: Sequence[Any]) -> None:
        """Write the newest epoch of the history, a sequence of dataclasses."""
        text = io.StringIO()
        names = [f.name for f in dataclasses.fields(history[0])]
        rows = csv.DictWriter(text, ["epoch", *names], lineterminator="\n")
        rows.writeheader()
        rows.writerows({"epoch": n + 1, **dataclasses.asdict(epoch)} for n, epoch in enumerate(history))
        write_text(self._csv, text.getvalue())
        self._scalars(len(history) - 1, history[-1])

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._board is not None:
            self._board.close()
        if self.tracked is not None:
            self.tracked.close()

    def _scalars(self, number: int, epoch: Any) -> None:
        if self.tracked is not None:
            self.tracked.log(number + 1, dataclasses.asdict(epoch))
        if self._board is not None:
            for name, value in dataclasses.asdict(epoch).items():
                self._board.add_scalar(name, value, number + 1)
            self._board.flush()


def _tensorboard(folder: Path) -> Any | None:
    try:
        from torch.utils.tensorboard import SummaryWriter  # the package may be absent
    except ImportError:
        return None
    return SummaryWriter(str(folder))
