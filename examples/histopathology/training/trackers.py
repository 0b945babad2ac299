"""Experiment trackers through accelerate: MLflow, Weights & Biases and others.

Each training is a run with its configuration, and its epochs are the steps. The tracker's own settings say where its
runs are kept (``MLFLOW_TRACKING_URI``, ``wandb login``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from ..errors import ExampleError

PROJECT = "convlora-histopathology"
# TensorBoard's files are always written, see `logs`.
NAMES = tuple(sorted(str(name) for name in LOGGER_TYPE_TO_CLASS if str(name) != "tensorboard"))
_PACKAGES = {"comet_ml": "comet-ml"}
# The trackers' options for a run's name; other trackers find it in the configuration.
_NAMED = {
    "mlflow": "run_name",
    "wandb": "name",
    "trackio": "name",
    "swanlab": "experiment_name",
    "clearml": "task_name",
}


def check_tracker(name: str | None) -> None:
    """Refuse a tracker that is unknown or not installed; None is accepted.

    Raises:
        ExampleError: an unknown name, or a package that is not installed.
    """
    if name is None:
        return
    if name not in NAMES:
        raise ExampleError(f"--tracker {name}: give one of {', '.join(NAMES)}.")
    if name not in {str(each) for each in get_available_trackers()}:
        raise ExampleError(f"--tracker {name}: its package is not installed: pip install {_PACKAGES.get(name, name)}.")


class TrackedRun:
    """One run in the accelerator's trackers, if it has any; for the first process.

    Args:
        accelerator: made with ``log_with``.
        name: name of the run.
        config: plain values, which may be nested.

    Raises:
        ExampleError: a tracker cannot start a run.
    """

    def __init__(self, accelerator: Accelerator, name: str, config: Mapping[str, Any]) -> None:
        self.trackers: list[Any] = []
        self.name = name
        names = [str(each) for each in accelerator.log_with]
        if not names:
            return
        named = {each: {_NAMED[each]: name} for each in names if each in _NAMED}
        accelerator.trackers = []  # else accelerate would start the trackers of the previous run again
        try:
            accelerator.init_trackers(PROJECT, config={"training": name, **flat(config)}, init_kwargs=named)
        except Exception as error:  # each tracker has its own kinds of errors
            raise ExampleError(f"--tracker {', '.join(names)}: cannot start a run ({_brief(error)}).") from error
        self.trackers = list(accelerator.trackers)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the numbers of one step. A tracker that fails does not end the training: it is dropped with a warning."""
        known = {key: value for key, value in values.items() if value is not None}
        for tracker in list(self.trackers):
            self._tried(tracker, partial(tracker.log, known, step=step))

    def close(self) -> None:
        """End the run."""
        for tracker in list(self.trackers):
            self._tried(tracker, tracker.finish)

    def _tried(self, tracker: Any, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # for example, the server went away
            self.trackers.remove(tracker)
            warnings.warn(
                f"--tracker {tracker.name}: run {self.name} is incomplete, since the tracker failed ({_brief(error)}).",
                stacklevel=3,
            )
            with suppress(Exception):
                tracker.finish()


def flat(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Join nested keys with points, and turn values that trackers do not take into text."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = value if isinstance(value, (str, int, float, bool)) else str(value)
    return found


def _brief(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
