"""A job in one or several processes by accelerate: its folder, and the work of its first process.

``accelerate launch`` and ``torchrun`` both set the variables that accelerate reads; without them there is one process.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from rich.console import Console
from torch import nn

from ..errors import ExampleError

PRECISIONS = {"fp32": "no", "bf16": "bf16"}

T = TypeVar("T")

# The others wait while the first process checks and tests an adapter; torch's limit of ten minutes would end them.
_PATIENCE = timedelta(hours=2)


def make_accelerator(precision: str = "fp32", tracker: str | None = None) -> Accelerator:
    """Make accelerate's object for this run's processes and the precision of their training steps.

    Raises:
        ExampleError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ExampleError(f"precision {precision!r}: give one of {', '.join(PRECISIONS)}.")
    # accelerate keeps one state for the whole program and refuses a second precision.
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision=PRECISIONS[precision],
        log_with=tracker,
        # Without this option, accelerate would let torchrun's processes on CPUs train without connecting them.
        cpu=several_processes() and not torch.cuda.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
    )


def several_processes() -> bool:
    """Whether a launcher started several processes; this does not initialise them."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first_process() -> bool:
    """Whether this is the process that prints and writes; this does not initialise the processes."""
    return int(os.environ.get("RANK", "0")) == 0


@dataclass(frozen=True)
class Job:
    """The folder and the processes of a run's trainings.

    Attributes:
        out: folder of all files.
        console: console for progress; only that of the first process is shown.
        resume: whether to continue an earlier run in ``out``.
        done: names of the trainings that this job has done.
    """

    out: Path
    console: Console = field(default_factory=lambda: Console(quiet=True))
    accelerator: Accelerator = field(default_factory=make_accelerator)
    resume: bool = False
    done: set[str] = field(default_factory=set)

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def processes(self) -> int:
        """The number of processes that train together."""
        return int(self.accelerator.num_processes)

    def wait(self) -> None:
        """Wait until every process is here."""
        self.accelerator.wait_for_everyone()

    def gathered(self, values: Sequence[T]) -> list[T]:
        """The concatenated values of all processes, in each of them."""
        return list(gather_object(list(values)))

    def first_decides(self, value: Callable[[], T]) -> T:
        """The value that the first process computes, in every process; its error is raised in all of them."""
        answer: list[tuple[T | None, str]] = [(None, "")]
        if self.is_first:
            try:
                answer = [(value(), "")]
            except ExampleError as error:
                answer = [(None, str(error))]
        broadcast_object_list(answer)
        result, fault = answer[0]
        if fault:
            raise ExampleError(fault)
        return result  # type: ignore[return-value]

    def share_buffers(self, model: nn.Module) -> None:
        """Copy the first process's buffers to all: tracked statistics differ, since each process saw other patches."""
        if self.processes > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)
