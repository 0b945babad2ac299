"""The ``convlora`` program: the options and the help text of each command.

The files that do the work import torch, and are imported when their command runs.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from .._version import __version__
from .answers import answering
from .options import (
    AdapterArgument,
    Adapting,
    AnyBaseOption,
    Building,
    ForceOption,
    Measuring,
    ModelArgument,
    Nearness,
    OutArgument,
    Targeting,
    To,
)

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


def _command(file: str) -> Callable[[Callable[..., None]], None]:
    """Make a command of a function's options and docstring; the function of its name in this file does the work."""

    def register(options: Callable[..., None]) -> None:
        name = options.__name__

        def run(**values: Any) -> Any:
            return getattr(import_module(f".{file}", __package__), name)(**values)

        app.command(name)(answering(options, run))

    return register


@_command("planning")
def plan(model: ModelArgument, building: Building, adapting: Adapting) -> None:
    """Show what inject would do to each layer, and change nothing.

    Example: convlora plan resnet50 --num-classes 2 --rank 8
    """


@_command("inspecting")
def inspect(source: AdapterArgument) -> None:
    """Show what a saved adapter holds, from its file alone.

    Every tensor is compared with its digest, so a damaged file is an error.

    Example: convlora inspect tumour/
    """


@_command("differing")
def diff(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] FIRST SECOND",
            help="Two adapters; with a model before them, files of peft and LyCORIS, too.",
        ),
    ],
    building: Building,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="End with exit code 3 where the two differ.")] = False,
) -> None:
    """Compare two adapters: settings, layers, and their changes.

    Example: convlora diff tumour/ tumour-small/
    """


@_command("changing")
def merge(
    model: ModelArgument,
    source: AdapterArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors file to write.", show_default=False)],
    building: Building,
    factor: Annotated[
        float,
        typer.Option(
            "--scale", help="The adapter's strength: W + scale · (W' − W). Head and norm statistics stay its own."
        ),
    ] = 1.0,
    interpolate: Annotated[
        bool, typer.Option("--interpolate", help="Scale the change of head and norm statistics, too.")
    ] = False,
    any_base: AnyBaseOption = False,
    force: ForceOption = False,
) -> None:
    """Write the model's state dict with an adapter merged into it.

    The model needs the weights that the adapter was trained on: --weights or --pretrained.

    Example: convlora merge resnet50 tumour/ out.safetensors --weights base.pth
    """


@_command("changing")
def convert(
    model: ModelArgument,
    source: AdapterArgument,
    out: OutArgument,
    building: Building,
    to: Annotated[
        To, typer.Option(help="Whose files to write; OUT is one file for diffusers and lycoris.")
    ] = "convlora",
    prefix: Annotated[
        str | None, typer.Option(help="Which model's adapter to read of several, or to write: unet, lora_unet, …")
    ] = None,
    any_base: AnyBaseOption = False,
    force: ForceOption = False,
) -> None:
    """Convert an adapter between convlora, peft, diffusers and LyCORIS.

    Example: convlora convert resnet50 peft-adapter/ tumour/ --weights base.pth
    """


@_command("changing")
def extract(
    model: ModelArgument,
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="Weights after the fine-tuning.", show_default=False)],
    out: OutArgument,
    building: Building,
    targeting: Targeting,
    nearness: Nearness,
    force: ForceOption = False,
) -> None:
    """Make an adapter of what a full fine-tuning changed.

    --weights or --pretrained are the weights before it.

    Example: convlora extract resnet50 tuned.pth tumour/ --weights base.pth -r 8
    """


@_command("changing")
def shrink(
    model: ModelArgument,
    source: AdapterArgument,
    out: OutArgument,
    building: Building,
    nearness: Nearness,
    force: ForceOption = False,
) -> None:
    """Lower the ranks of an adapter.

    Each layer is given the nearest change that it can have at the lower rank.

    Example: convlora shrink resnet50 tumour/ small/ --weights base.pth -r 4
    """


@_command("benching")
def bench(model: ModelArgument, building: Building, adapting: Adapting, measuring: Measuring) -> None:
    """Measure a training step and a forward on this machine.

    The adapter is compared with full fine-tuning and with the base, in interleaved rounds.

    Example: convlora bench resnet50 --batch 4 --rank 8
    """


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
