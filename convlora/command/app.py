"""The program: its commands by name."""

from __future__ import annotations

from typing import Annotated

import typer

from .._version import __version__
from .answers import answering
from .benching import bench
from .changing import convert, extract, merge, shrink
from .differing import diff
from .inspecting import inspect
from .planning import plan

HELP = """LoRA adapters for the convolutions of any PyTorch network.

MODEL is the name of a timm or torchvision network, or MODULE:FUNCTION for a function of yours that builds one.
With --json a command prints one JSON object and nothing else.

Exit codes: 0 done; 1 refused, nothing was changed and stderr says why; 2 the command was called wrongly;
3 two adapters differ (diff --exit-code); 70 an error of convlora's own.
"""

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (plan, inspect, diff, merge, convert, extract, shrink, bench):
    app.command(_command.__name__)(answering(_command))


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
