"""Options that several commands share: which model, built how; and which adapter.

Typer reads them off the annotations.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from torch import nn

from .._layer.paths import TrainingPath
from .._model.options import Pattern, Request
from .._model.targets import Target
from .._plan import Init, NormPolicy
from .answers import CommandError

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A timm or torchvision name (timm:NAME, torchvision:NAME), or MODULE:FUNCTION.",
        show_default=False,
    ),
]
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)]
ForceOption = Annotated[bool, typer.Option("--force", help="Write into OUT also where something is there.")]


@dataclass(frozen=True)
class Building:
    """How the model is built."""

    num_classes: Annotated[int | None, typer.Option(help="Classes of the head.")] = None
    arg: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Another argument of the builder: in_chans=1.")
    ] = None
    weights: Annotated[
        Path | None, typer.Option(help="Weights to load: safetensors, or a state dict that torch.save wrote.")
    ] = None
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="The library's own weights, from its cache or the network.")
    ] = False

    def arguments(self) -> dict[str, Any]:
        """What the builder is called with."""
        pairs = dict(_pair(text, "--arg") for text in self.arg or ())
        given = {} if self.num_classes is None else {"num_classes": self.num_classes}
        return given | {name: _value(text) for name, text in pairs.items()}


@dataclass(frozen=True)
class Nearness:
    """How near a change of lower rank is to be: one of the three, which the library checks."""

    rank: Annotated[int | None, typer.Option("--rank", "-r", help="For every layer; or")] = None
    energy: Annotated[
        float | None, typer.Option(help="share of the squared change to keep in each layer, 0 to 1; or")
    ] = None
    tolerance: Annotated[float | None, typer.Option(help="relative error that each layer may have, 0 to 1.")] = None

    def arguments(self) -> dict[str, Any]:
        """The library's arguments."""
        return asdict(self)


@dataclass(frozen=True)
class Targeting:
    """Which layers. Here and in :class:`Adapting` each field has the name that the library gives the option."""

    target_modules: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            metavar="PATTERN",
            help="Layers to adapt: a glob (layer4.*), re:EXPRESSION, type:Linear. Default: every convolution.",
        ),
    ] = None
    exclude_modules: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="PATTERN", help="Layers to leave alone, named in the same ways."),
    ] = None
    modules_to_save: Annotated[
        list[str] | None,
        typer.Option("--save", metavar="PATTERN", help="Modules trained in full; default the head, 'none' for none."),
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
    """What adapter; as the arguments of :func:`convlora.inject`, with its defaults."""

    rank: Annotated[int | None, typer.Option("--rank", "-r", help="Default 8; with a budget, the largest.")] = (
        Request.rank
    )
    alpha: Annotated[float | None, typer.Option(help="Default twice the rank.")] = Request.alpha
    rank_pattern: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN=RANK", help="Another rank for these layers.")
    ] = None
    alpha_pattern: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN=ALPHA", help="Another alpha for these layers.")
    ] = None
    budget: Annotated[str | None, typer.Option(help="All factors together: 1%, or a number of parameters.")] = None
    norm: Annotated[NormPolicy, typer.Option(help="Norm statistics: held, or moving with the adapter.")] = Request.norm
    dropout: Annotated[float, typer.Option(help="On the adapter's branch, 0 ≤ p < 1.")] = Request.dropout
    use_rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / √rank.")] = Request.use_rslora
    use_dora: Annotated[bool, typer.Option("--dora", help="Train each output channel's size apart.")] = Request.use_dora
    freeze_A: Annotated[bool, typer.Option("--freeze-a", help="Train B alone.")] = Request.freeze_A
    method: Annotated[str, typer.Option(help="How a weight may change: lora, or another method.")] = Request.method
    method_pattern: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN=METHOD", help="Another method for these layers.")
    ] = None
    method_options: Annotated[
        list[str] | None, typer.Option("--method-option", metavar="NAME=VALUE", help="An option of the method.")
    ] = None
    init: Annotated[Init | None, typer.Option(help="How the factors begin; default kaiming.")] = Request.init
    path: Annotated[TrainingPath, typer.Option(help="How a convolution computes in training.")] = Request.path
    mask_activations: Annotated[
        Literal["bytes", "bits"] | None, typer.Option(help="Activations keep a mask in training, so much a number.")
    ] = None

    def arguments(self) -> dict[str, Any]:
        """The library's arguments."""
        return {
            **super().arguments(),
            "rank_pattern": _numbers(self.rank_pattern, int, "--rank-pattern"),
            "alpha_pattern": _numbers(self.alpha_pattern, float, "--alpha-pattern"),
            "method_pattern": _by_pattern(self.method_pattern, "--method-pattern"),
            "method_options": _options(self.method_options),
            "budget": _budget(self.budget),
            "mask_activations": {None: False, "bytes": True, "bits": "bits"}[self.mask_activations],
        }


def _pair(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.rpartition("=") if option != "--arg" else text.partition("=")
    if not (name and equals and value):
        raise typer.BadParameter(f"{option} {text}: give NAME=VALUE.")
    return name, value


def _value(text: str) -> Any:
    """A value of JSON, or else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _numbers(texts: list[str] | None, kind: type[int] | type[float], option: str) -> dict[Pattern, float] | None:
    """A number for each pattern."""
    pairs = dict(_pair(text, option) for text in texts or ())
    return {_pattern(name): _number(name, value, kind, option) for name, value in pairs.items()} or None


def _by_pattern(texts: list[str] | None, option: str) -> dict[Pattern, str] | None:
    return {_pattern(name): value for name, value in (_pair(text, option) for text in texts or ())} or None


def _options(texts: list[str] | None) -> dict[str, Any] | None:
    return {name: _value(value) for name, value in (_pair(text, "--method-option") for text in texts or ())} or None


def _number(pattern: str, text: str, kind: type[int] | type[float], option: str) -> float:
    try:
        return kind(text)
    except ValueError:
        raise typer.BadParameter(f"{option} {pattern}={text}: {text} is no number of its kind.") from None


def _budget(text: str | None) -> Any:
    """A share such as ``1%`` as it is; else a number, if it is one. ``1e6`` is whole, ``1.0`` a share."""
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
        raise CommandError(f"{text} is no regular expression ({cause}). Nothing was changed.") from cause


def _targets(texts: list[str] | None) -> list[Target] | None:
    return None if texts is None else [_target(text) for text in texts]


def _target(text: str) -> Target:
    if not text.startswith("type:"):
        return _pattern(text)
    kind = getattr(nn, text.removeprefix("type:"), None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise CommandError(f"{text}: torch.nn has no such layer; type:Conv1d, say. Nothing was changed.")
    return kind


To = Literal["convlora", "peft", "diffusers", "lycoris"]
"""Whose files ``convert`` writes."""
