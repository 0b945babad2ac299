"""Builds a model from its name on the command line, and loads its weights.

timm and torchvision are imported when a name needs them.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import typer
from torch import nn

from .answers import CommandError
from .options import Building
from .weights import load_weights

TIMM, TORCHVISION = "timm", "torchvision"
LISTS = {TIMM: "timm", TORCHVISION: "torchvision.models"}
"""The module of each library that lists and builds its models."""


@dataclass(frozen=True)
class Built:
    """A model, and whether its weights were loaded (or may have been, by the user's own function)."""

    name: str
    model: nn.Module
    has_weights: bool


def build(name: str, how: Building) -> Built:
    """Build the model of this name, in eval mode.

    Raises:
        CommandError: there is no such model, it cannot be built, or its weights cannot be loaded.
        typer.BadParameter: options exclude each other.
    """
    if how.pretrained and how.weights is not None:
        raise typer.BadParameter("--pretrained and --weights exclude each other.")
    library, inner = _library_of(name)
    if library is None:
        if how.pretrained:
            raise typer.BadParameter(
                f"--pretrained: {name} is your own function; load weights in it, or give --weights FILE."
            )
        model = _checked(name, _your_own(name, how.arguments()))
    else:
        make = _from_timm if library == TIMM else _from_torchvision
        model = _checked(name, make(inner, how.arguments(), how.pretrained))
    if how.weights is not None:
        load_weights(model, how.weights)
    return Built(name, model.eval(), library is None or how.pretrained or how.weights is not None)


def need_weights(built: Built, why: str) -> None:
    """Raise CommandError if the model has random weights, with which the result would be useless."""
    if not built.has_weights:
        raise CommandError(
            f"{built.name} has random weights, and {why}. Give --weights FILE or --pretrained. Nothing was written."
        )


def _library_of(name: str) -> tuple[str | None, str]:
    """Return the library that builds the model, and the model's name in it; None for ``module:function``."""
    first, colon, inner = name.partition(":")
    if colon and first in (TIMM, TORCHVISION):
        _module(first, name)
        if not (set(":/") & set(inner) or _is_known(first, inner)):  # names with : or / are addresses for timm
            near = _nearest(inner, _names(first))
            raise CommandError(f"{name}: {first} has no model {inner}. {near}Nothing was changed.")
        return first, inner
    if colon:
        return None, name
    known: list[str] = []
    missing: list[str] = []
    for library in (TIMM, TORCHVISION):
        try:
            found = _names(library)
        except ImportError:
            missing.append(library)
            continue
        if name.partition(".")[0] in found:
            return library, name
        known += found
    absent = f"{' and '.join(missing)} cannot be imported: pip install it to use its models. " if missing else ""
    raise CommandError(
        f"{name} is not a model of timm or torchvision, and not of the form MODULE:FUNCTION. "
        f"{_nearest(name, known)}{absent}Nothing was changed."
    )


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, list(dict.fromkeys(known)), 3)
    return f"Closest names: {', '.join(near)}. " if near else ""


def _is_known(library: str, name: str) -> bool:
    """Return whether the library builds this model; timm's list lacks older names, which it still builds."""
    if library == TIMM:
        return bool(importlib.import_module("timm").is_model(name))
    return name.lower() in _names(library)


def _names(library: str) -> list[str]:
    return list(importlib.import_module(LISTS[library]).list_models())


def _module(library: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(LISTS[library])
    except ImportError as cause:
        raise CommandError(f"{name}: {library} cannot be imported ({cause}): pip install {library}.") from cause


def _from_timm(name: str, arguments: dict[str, Any], pretrained: bool) -> object:
    timm = _module(TIMM, name)

    def where() -> str:
        config = timm.get_pretrained_cfg(name)
        if config is None or not config.hf_hub_id:
            return f"timm has none for {name}; `timm.list_pretrained()` lists the models with pretrained weights"
        return f"run `hf download {config.hf_hub_id} model.safetensors --local-dir .` on a machine with a network"

    return _called(
        f"timm:{name}", lambda: timm.create_model(name, pretrained=pretrained, **arguments), pretrained, where
    )


def _from_torchvision(name: str, arguments: dict[str, Any], pretrained: bool) -> object:
    models = _module(TORCHVISION, name)
    weights = None
    if pretrained:
        weights = _called(f"torchvision:{name}", lambda: models.get_model_weights(name).DEFAULT)

    def make() -> object:
        takes = inspect.signature(models.get_model_builder(name)).parameters
        # By default a detector's builder downloads its backbone's weights.
        backbone = {"weights_backbone": None} if "weights_backbone" in takes else {}
        return models.get_model(name, weights=None, **backbone | arguments)

    model = _called(f"torchvision:{name}", make)
    if weights is not None and isinstance(model, nn.Module):
        state = _called(
            f"torchvision:{name}",
            weights.get_state_dict,
            True,
            lambda: f"download {weights.url} on a machine with a network",
        )
        load_weights(model, state, f"{weights}")
    return model


def _called(
    name: str, make: Callable[[], Any], pretrained: bool = False, where: Callable[[], str] | None = None
) -> Any:
    """Call a builder; any exception is raised as one CommandError with the remedy."""
    try:
        return make()
    except Exception as cause:
        first = (str(cause) or repr(cause)).splitlines()[0]
        reason = f"{type(cause).__name__}: {first}"
        if pretrained and where is not None:
            raise CommandError(
                f"{name}: it cannot be built with its pretrained weights ({reason}). Offline, {where()}, and give the "
                "file as --weights FILE. Nothing was changed."
            ) from cause
        raise CommandError(f"{name} cannot be built ({reason}). Nothing was changed.") from cause


def _your_own(name: str, arguments: dict[str, Any]) -> object:
    module, _, function = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` would
    try:
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except Exception as cause:
        reason = f"{type(cause).__name__}: {cause}"
        raise CommandError(f"{name} cannot be imported ({reason}). Nothing was changed.") from cause
    return _called(name, lambda: found(**arguments))


def _checked(name: str, model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise CommandError(f"{name} returned a {type(model).__name__}, not a torch.nn.Module. Nothing was changed.")
    return model
