"""One process or several, by accelerate: where a job runs, where it writes, and what only its first process does.

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

# The others wait while the first proves and tests an adapter; torch's own limit of ten minutes would end them.
_PATIENCE = timedelta(hours=2)


def make_accelerator(precision: str = "fp32", tracker: str | None = None) -> Accelerator:
    """The processes of this run, and the precision of their training steps.

    Raises:
        ExampleError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ExampleError(f"precision {precision!r}: give one of {', '.join(PRECISIONS)}.")
    # accelerate keeps one state for the whole program and refuses a second precision in it.
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision=PRECISIONS[precision],
        log_with=tracker,
        # Unless told that it is on CPUs, accelerate would let torchrun's processes train unconnected.
        cpu=several_processes() and not torch.cuda.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
    )


def several_processes() -> bool:
    """Whether a launcher started more than one, told without starting anything."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first_process() -> bool:
    """Whether this is the process that prints and writes, told without starting anything."""
    return int(os.environ.get("RANK", "0")) == 0


@dataclass(frozen=True)
class Job:
    """Where trainings run and write.

    Attributes:
        out: the folder of everything written.
        console: where progress goes; the first process's alone is shown.
        resume: whether to go on from what an earlier run left in ``out``.
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
        """How many train together."""
        return int(self.accelerator.num_processes)

    def wait(self) -> None:
        """Until every process is here."""
        self.accelerator.wait_for_everyone()

    def gathered(self, values: Sequence[T]) -> list[T]:
        """The values of all processes, one after the other, in each of them."""
        return list(gather_object(list(values)))

    def first_decides(self, value: Callable[[], T]) -> T:
        """What the first process computes, in all of them; its error is everyone's."""
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
        """Give every process the first one's buffers: statistics that moved differ, each saw its own patches."""
        if self.processes > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)
