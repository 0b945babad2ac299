"""The program: its commands by name."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .._version import __version__
from .answers import answering

HELP = """LoRA adapters for the convolutions of any PyTorch network.

MODEL is the name of a timm or torchvision network, or MODULE:FUNCTION for a function of yours that builds one.
With --json a command prints one JSON object and nothing else.

Exit codes: 0 done; 1 refused, nothing was changed and stderr says why; 2 the command was called wrongly;
3 two adapters differ (diff --exit-code); 70 an error of convlora's own.
"""

COMMANDS = {
    "plan": ("planning", "Show what inject would do to each layer, and change nothing."),
    "inspect": ("inspecting", "Show what a saved adapter holds, from its file alone."),
    "diff": ("differing", "Compare two adapters: settings, layers, and their changes."),
    "merge": ("changing", "Write the model's state dict with an adapter merged into it."),
    "convert": ("changing", "Convert peft's or LyCORIS' files to convlora's, or to peft's."),
    "extract": ("changing", "Make an adapter of what a full fine-tuning changed."),
    "shrink": ("changing", "Lower the ranks of an adapter."),
    "bench": ("benching", "Measure a training step and a forward on this machine."),
}
"""Each command's file and its line in the list. The files import torch, so they wait until their command is called."""


class Commands(TyperGroup):
    """The list of commands, each without its options until it is named."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command as its file has it."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, _whole(name) if name in COMMANDS else command, rest


def _whole(name: str) -> Any:
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    alone.command(name)(answering(getattr(import_module(f".{COMMANDS[name][0]}", __package__), name)))
    return typer.main.get_command(alone)


app = typer.Typer(
    cls=Commands,
    help=HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, (_, _help) in COMMANDS.items():
    app.command(_name, help=_help)(lambda: None)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the release and stop.")
    ] = False,
) -> None:
    pass
