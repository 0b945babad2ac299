"""Options that several commands share, for the model and for the adapter; typer reads them from the annotations.

Nothing here imports torch, so that ``--help`` does not need it; a test compares names, types and defaults with those of
the library.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from .._layer.paths import TrainingPath
from .answers import CommandError

if TYPE_CHECKING:
    from .._model.targets import Target

T = TypeVar("T")
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A timm or torchvision name (timm:NAME, torchvision:NAME), or MODULE:FUNCTION.",
        show_default=False,
    ),
]
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)]
AdapterArgument = Annotated[
    str, typer.Argument(metavar="DIR", help="The adapter: a folder, a file, or user/repo.", show_default=False)
]
AnyBaseOption = Annotated[
    bool, typer.Option("--any-base", help="Load onto other weights than the adapter was trained on, too.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Write into OUT even if something is there already.")]
To = Literal["convlora", "peft", "diffusers", "lycoris"]
"""The library whose files ``convert`` writes."""
Pattern = str | re.Pattern[str]
Texts = list[str] | None


@dataclass(frozen=True)
class Building:
    """Options for building the model."""

    num_classes: Annotated[int | None, typer.Option(help="Classes of the head.")] = None
    arg: Annotated[
        Texts, typer.Option(metavar="NAME=VALUE", help="An argument of the builder, such as in_chans=1.")
    ] = None
    weights: Annotated[Path | None, typer.Option(help="A state dict: safetensors, or of torch.save.")] = None
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="The library's own weights, cached or downloaded.")
    ] = False

    def arguments(self) -> dict[str, Any]:
        """Return the builder's keyword arguments."""
        given = {} if self.num_classes is None else {"num_classes": self.num_classes}
        return given | {name: _value(text) for name, text in _pairs(self.arg, "--arg")}


@dataclass(frozen=True)
class Nearness:
    """Options for an approximation of lower rank: one of the three; the library checks that."""

    rank: Annotated[int | None, typer.Option("--rank", "-r", help="Rank of each layer.")] = None
    energy: Annotated[float | None, typer.Option(help="Or: share of the squared change to keep, 0 to 1.")] = None
    tolerance: Annotated[float | None, typer.Option(help="Or: relative error allowed, 0 to 1.")] = None

    def arguments(self) -> dict[str, Any]:
        """The library's arguments."""
        return asdict(self)


@dataclass(frozen=True)
class Targeting:
    """Options that choose layers. Here and in :class:`Adapting` the fields are named as the library's arguments."""

    target_modules: Annotated[
        Texts,
        typer.Option(
            "--target",
            metavar="PATTERN",
            help="Layers to adapt: a glob (layer4.*), re:EXPRESSION, type:Linear. Default: every convolution.",
        ),
    ] = None
    exclude_modules: Annotated[
        Texts, typer.Option("--exclude", metavar="PATTERN", help="Layers to skip, in the same notation.")
    ] = None
    modules_to_save: Annotated[
        Texts,
        typer.Option("--save", metavar="PATTERN", help="Modules to train in full; 'none' for none. Default: the head."),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """The library's arguments."""
        saved = _targets(self.modules_to_save)
        return {
            **{each.name: getattr(self, each.name) for each in fields(self)},
            "target_modules": _targets(self.target_modules),
            "exclude_modules": _targets(self.exclude_modules),
            "modules_to_save": None if saved == ["none"] else "auto" if saved in (None, ["auto"]) else saved,
        }


@dataclass(frozen=True)
class Adapting(Targeting):
    """Options of the adapter: the arguments of :func:`convlora.inject`, with the same defaults."""

    rank: Annotated[int | None, typer.Option("--rank", "-r", help="Rank; with --budget, the largest. Default 8.")] = (
        None
    )
    alpha: Annotated[float | None, typer.Option(help="The scaling is alpha / rank. Default: twice the rank.")] = None
    rank_pattern: Annotated[Texts, typer.Option(metavar="PATTERN=RANK", help="Rank of these layers.")] = None
    alpha_pattern: Annotated[Texts, typer.Option(metavar="PATTERN=ALPHA", help="Alpha of these layers.")] = None
    budget: Annotated[str | None, typer.Option(help="Parameters of all factors together: 1%, or a number.")] = None
    norm: Annotated[Literal["freeze", "track"], typer.Option(help="Whether norm statistics may move.")] = "freeze"
    dropout: Annotated[float, typer.Option(help="Dropout on the adapter's branch, 0 ≤ p < 1.")] = 0.0
    use_rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / √rank.")] = False
    use_dora: Annotated[bool, typer.Option("--dora", help="Train magnitudes separately: DoRA.")] = False
    freeze_A: Annotated[bool, typer.Option("--freeze-a", help="Train B alone.")] = False
    method: Annotated[str, typer.Option(help="lora, dense, loha, lokr, hira, ia3, ssf, oft, boft or hra.")] = "lora"
    method_pattern: Annotated[Texts, typer.Option(metavar="PATTERN=METHOD", help="Method of these layers.")] = None
    method_options: Annotated[
        Texts, typer.Option("--method-option", metavar="NAME=VALUE", help="Option of the method.")
    ] = None
    init: Annotated[
        Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva"] | None,
        typer.Option(help="How the factors begin. Default: kaiming."),
    ] = None
    training_path: Annotated[TrainingPath, typer.Option(help="How a convolution computes in training.")] = "auto"
    mask_activations: Annotated[
        Literal["bytes", "bits"] | None, typer.Option(help="What activations keep for the backward.")
    ] = None

    def arguments(self) -> dict[str, Any]:
        """The library's arguments."""
        return {
            **super().arguments(),
            "rank_pattern": _by_pattern(self.rank_pattern, "--rank-pattern", int),
            "alpha_pattern": _by_pattern(self.alpha_pattern, "--alpha-pattern", float),
            "method_pattern": _by_pattern(self.method_pattern, "--method-pattern", str),
            "method_options": {name: _value(text) for name, text in _pairs(self.method_options, "--method-option")}
            or None,
            "budget": _budget(self.budget),
            "mask_activations": {None: False, "bytes": True, "bits": "bits"}[self.mask_activations],
        }


@dataclass(frozen=True)
class Measuring:
    """Options of the measurement in ``bench``."""

    batch: Annotated[int, typer.Option(min=1, help="Number of images.")] = 8
    size: Annotated[int, typer.Option(min=1, help="Height and width of an image, in pixels.")] = 224
    channels: Annotated[int, typer.Option(min=1, help="Channels of an image.")] = 3
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds; a warm-up round comes first.")] = 7
    device: Annotated[str, typer.Option(help="torch's name of the device.")] = "cpu"
    threads: Annotated[int | None, typer.Option(min=1, help="Threads that torch uses on a CPU.")] = None


def _pairs(texts: list[str] | None, option: str) -> Iterator[tuple[str, str]]:
    """Yield name and value of each NAME=VALUE; a pattern may hold =, and so may the value of --arg."""
    for text in texts or ():
        name, equals, value = text.rpartition("=") if option != "--arg" else text.partition("=")
        if not (name and equals and value):
            raise typer.BadParameter(f"{option} {text}: give NAME=VALUE.")
        yield name, value


def _value(text: str) -> Any:
    """Return the value of a JSON text, or the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _by_pattern(texts: list[str] | None, option: str, kind: Callable[[str], T]) -> dict[Pattern, T] | None:
    """Return the value of each pattern, as ``kind``; None without any."""
    return {_pattern(name): _as(kind, text, f"{option} {name}") for name, text in _pairs(texts, option)} or None


def _as(kind: Callable[[str], T], text: str, option: str) -> T:
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise typer.BadParameter(f"{option}={text}: give {wanted}.") from None


def _budget(text: str | None) -> Any:
    """Return a share such as ``1%`` as text, and a number as int or float: ``1e6`` is an int, ``1.0`` a share."""
    if text is None or not re.fullmatch(r"[0-9.eE+-]+", text):
        return text
    value = _value(text)
    return int(value) if isinstance(value, float) and value > 1 and value.is_integer() else value


def _pattern(text: str) -> Pattern:
    if not text.startswith("re:"):
        return text
    try:
        return re.compile(text.removeprefix("re:"))
    except re.error as cause:
        raise CommandError(f"{text} is not a regular expression ({cause}). Nothing was changed.") from cause


def _targets(texts: list[str] | None) -> list[Target] | None:
    return None if texts is None else [_target(text) for text in texts]


def _target(text: str) -> Target:
    if not text.startswith("type:"):
        return _pattern(text)
    from torch import nn

    kind = getattr(nn, text.removeprefix("type:"), None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise CommandError(f"{text}: torch.nn has no such layer; write type:Conv1d, for instance. Nothing was changed.")
    return kind
