"""A measurement: its settings, the results of each method, and both as JSON."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import convlora

from .measuring import Quartiles
from .peers import versions


@dataclass(frozen=True)
class Settings:
    """All settings of a measurement, apart from the machine."""

    model: str = "resnet50"
    batch: int = 16
    size: int = 224
    """Side of an image in pixels."""
    rank: int = 8
    rounds: int = 7
    """Counted rounds; one more is run first."""
    repeats: int = 1
    """Steps in a row for one figure."""
    device: str = "cpu"
    channels_last: bool = False
    amp: bool = False
    """Autocast to bfloat16."""
    apart: bool = False
    """Whether each method has its own process."""


@dataclass(frozen=True)
class Result:
    """The results of one method; times in seconds, sizes in bytes."""

    arm: str
    what: str
    unavailable: str = ""
    """Why there are no figures; empty if there are."""
    adapted: int = 0
    convolutions: int = 0
    trainable: int = 0
    """The number of trainable elements."""
    share: float = 0.0
    """The trainable share of the base's parameters."""
    stuck: int = 0
    """Trainable tensors that two steps did not move."""
    saved: int = 0
    """Bytes kept by autograd between forward and backward."""
    peak: int = 0
    """The peak of a step beyond parameters, buffers and the optimizer's state."""
    resting: int = 0
    """Parameters and buffers."""
    optimizer: int = 0
    file: int = 0
    """Bytes to store the trained model, given the base."""
    seconds: list[float] = field(default_factory=list)
    """Seconds of a step or a forward, one figure for each round."""
    ratios: list[float] = field(default_factory=list)
    """Times over the reference's, round by round."""
    other_ratios: dict[str, list[float]] = field(default_factory=dict)
    """Times over other methods', round by round."""

    @property
    def time(self) -> Quartiles:
        """Seconds of a step or a forward."""
        return Quartiles.of(self.seconds)

    @property
    def ratio(self) -> Quartiles:
        """Time over the reference's in the same round."""
        return Quartiles.of(self.ratios)


@dataclass(frozen=True)
class Run:
    """One measurement of all methods."""

    settings: Settings
    training: list[Result]
    inference: list[Result]
    environment: dict[str, Any]
    sweep: str = ""
    """The setting that a sweep varies, if this run is a point of one."""

    def to_json(self) -> dict[str, Any]:
        """The run as plain JSON data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Run:
        """The run that :meth:`to_json` wrote."""
        lists = {key: [Result(**item) for item in data[key]] for key in ("training", "inference")}
        return cls(**{**data, **lists, "settings": Settings(**data["settings"])})


Say = Callable[[str], object]
"""Called with lines of progress."""


def environment(device: torch.device) -> dict[str, Any]:
    """The kind of machine and the versions; nothing identifies the machine."""
    machine = platform.machine().replace("x86_64", "x86-64")
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{machine} CPU",
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "convlora": convlora.__version__,
        **versions(),
        "date": time.strftime("%Y-%m-%d"),
    }


def with_reference(names: Sequence[str], reference: str) -> list[str]:
    """The methods with the reference first; empty if there are none."""
    return [reference, *(name for name in names if name != reference)] if names else []
