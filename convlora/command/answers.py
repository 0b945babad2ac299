"""What every command has in common: an answer as text or as JSON, errors on stderr, an exit code that says which."""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import ConvLoraError

REFUSED, DIFFERS, OWN_ERROR = 1, 3, 70
"""Exit codes besides 0 and 2, which is the parser's."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


class CommandError(ConvLoraError):
    """What was asked for on the command line cannot be done. Nothing was changed."""


@dataclass(frozen=True)
class Answer:
    """What a command found: as JSON data, as text and tables for people, and the exit code."""

    data: dict[str, Any]
    shown: Sequence[str | Table]
    code: int = 0


def answering(run: Callable[..., Answer]) -> Callable[..., None]:
    """The command that typer takes, of a function that answers.

    A parameter whose type is a dataclass of options becomes an option for each of its fields; ``--json`` is added.
    """
    grouped: dict[str, tuple[type, list[str]]] = {}
    parameters: list[inspect.Parameter] = []
    hints = get_type_hints(run, include_extras=True)
    for name, own in inspect.signature(run).parameters.items():
        kind = hints[name]
        if is_dataclass(kind) and isinstance(kind, type):
            grouped[name] = (kind, [field.name for field in fields(kind)])
            parameters += _options_of(kind)
        else:
            parameters.append(own.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=kind))
    parameters.append(_parameter("as_json", JsonOption, False))

    def command(**values: Any) -> None:
        as_json = values.pop("as_json")
        for name, (kind, names) in grouped.items():
            values[name] = kind(**{each: values.pop(each) for each in names})
        _answer(lambda: run(**values), as_json)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    command.__name__, command.__doc__ = run.__name__, run.__doc__
    return command


def _options_of(kind: type) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [
        _parameter(each.name, hints[each.name], inspect.Parameter.empty if each.default is MISSING else each.default)
        for each in fields(kind)
    ]


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _answer(run: Callable[[], Answer], as_json: bool) -> None:
    """Run, show, and leave with the answer's code. stdout is for the answer: what else is printed goes to stderr."""
    try:
        with contextlib.redirect_stdout(sys.stderr), _plain_warnings():
            answer = run()
        text = _json(answer.data) if as_json else ""
    except ConvLoraError as error:
        if as_json:
            typer.echo(_json({"error": type(error).__name__, "message": str(error)}))
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(REFUSED) from None
    except (typer.Exit, typer.BadParameter):
        raise
    except Exception:
        traceback.print_exc()
        raise typer.Exit(OWN_ERROR) from None
    if as_json:
        typer.echo(text)
    else:
        _show(answer.shown)
    raise typer.Exit(answer.code)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line each on stderr, without the line of code that they came from."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: typer.echo(f"warning: {message}", err=True)
        yield


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2, allow_nan=False)


def _show(shown: Sequence[str | Table]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 1000  # into a file or another program: lines as they are
    for each in shown:
        console.print(Text(each) if isinstance(each, str) else each, soft_wrap=isinstance(each, str))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], align: str, title: str | None = None) -> Table:
    """A table without lines; ``align`` has l or r for each column."""
    made = Table(box=None, title=title, title_justify="left", pad_edge=False, header_style="bold")
    for head, side in zip(heads, align, strict=True):
        made.add_column(head, justify="left" if side == "l" else "right", overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made
