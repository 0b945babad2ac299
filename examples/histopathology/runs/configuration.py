"""A run's options as a file: ``--config run.yaml`` reads a command's options by name, and each run writes its own file.

The command line overrides the file. The key ``command`` names the file's sub-command; a file without it fits any
command that has its options.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import typer
import yaml

from ..errors import ExampleError
from ..methods.catalogue import read_yaml

NAME = "run.yaml"
_OF_THE_RUN = ("config", "resume")
"""Options that do not affect the results."""


def take(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make a file's values the defaults of a command, before the command reads its options."""
    if path is not None and not ctx.resilient_parsing:
        try:
            ctx.default_map = read(path, ctx)
        except ExampleError as error:  # raised while options are parsed, where no command catches it yet
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error
    return path


def read(path: Path, ctx: typer.Context) -> dict[str, Any]:
    """Read the options of a file, by the names of the command's parameters.

    Raises:
        ExampleError: no such file, not YAML, an unknown option, a value that is a mapping, a file of another command.
    """
    stored = read_yaml(path, f"--config {path}", "write a line for each option, such as `epochs: 3`")
    command = stored.pop("command", _command(ctx))
    if command != _command(ctx):
        whose = "the main job, without a sub-command" if command is None else f"`{command}`"
        raise ExampleError(f"--config {path}: is for {whose}; run that, or remove the line `command`.")
    known = [str(each.name) for each in ctx.command.params if each.name not in _OF_THE_RUN]
    options = {}
    for key, value in stored.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ExampleError(f"--config {path}: {key}: unknown option; {hint}Known: {', '.join(known)}.")
        if isinstance(value, dict):
            raise ExampleError(f"--config {path}: {key}: holds keys; write one value, or a list.")
        if value is not None:
            options[name] = ",".join(map(str, value)) if isinstance(value, list) else value
    return options


def written(ctx: typer.Context) -> str:
    """The file that repeats a command with all its options, defaults included."""
    names = [each.name for each in ctx.command.params if each.name not in _OF_THE_RUN]
    given = {name: ctx.params.get(name) for name in names}
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}
    kept = {key: value for key, value in plain.items() if value is not None}
    text: str = yaml.safe_dump({"command": _command(ctx), **kept}, sort_keys=False, allow_unicode=True)
    return text


def _command(ctx: typer.Context) -> str | None:
    """The sub-command's name; None for the main job."""
    return None if ctx.parent is None else str(ctx.info_name)
