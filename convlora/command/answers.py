"""What all commands share: the answer as text or JSON on stdout, errors on stderr, and the exit codes."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import ConvLoraError

REFUSED, DIFFERS, OWN_ERROR = 1, 3, 70
"""Exit codes besides 0 and the parser's 2."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]

IN_PYTHON = ("check_base", "check_finite", "prefix", "example", "init_data")
"""Arguments in texts of the library for which not every command has an option."""

WORDS = {
    "`print(convlora.plan(model))` lists": "`convlora plan MODEL` lists",
    "give re.compile(...)": "write re:EXPRESSION",
    "modules_to_save=None": "modules_to_save='none'",
}
"""Expressions in Python, and what to write on the command line instead."""

_ARGUMENT = re.compile(r"""\b([a-z_A]+)(?:=('[^'\n]*'|"[^"]*"|\[[^]]*]|\(\)|[\w.]*\w))?""")
_ITEM = re.compile(r"""'[^'\n]*'|"[^"]*"|[\w.]+""")
Say = Callable[[str], str]


class CommandError(ConvLoraError):
    """The command cannot do what its arguments ask for. Nothing was changed."""


@dataclass(frozen=True)
class Answer:
    """A command's result: JSON data, the same as lines and tables for people, and the exit code."""

    data: dict[str, Any]
    shown: Sequence[str | Table]
    code: int = 0


def answering(declared: Callable[..., None], run: Callable[..., Answer]) -> Callable[..., None]:
    """Return the typer command with the options and docstring of ``declared``, which ``run`` answers.

    A parameter whose type is a dataclass becomes one option for each of its fields; ``--json`` is added.
    """
    grouped: dict[str, tuple[type, list[str]]] = {}
    parameters: list[inspect.Parameter] = []
    hints = get_type_hints(declared, include_extras=True)
    for name, own in inspect.signature(declared).parameters.items():
        kind = hints[name]
        if is_dataclass(kind) and isinstance(kind, type):
            grouped[name] = (kind, [field.name for field in fields(kind)])
            parameters += _options_of(kind)
        else:
            parameters.append(own.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=kind))
    parameters.append(_parameter("as_json", JsonOption, False))
    parameters.append(_parameter("context", typer.Context, inspect.Parameter.empty))

    def command(context: typer.Context, **values: Any) -> None:
        as_json = values.pop("as_json")
        for name, (kind, names) in grouped.items():
            values[name] = kind(**{each: values.pop(each) for each in names})
        flags = {str(each.name): max(each.opts, key=len) for each in context.command.params}
        _answer(lambda: run(**values), as_json, lambda text: in_options(text, flags))

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    command.__name__, command.__doc__ = declared.__name__, declared.__doc__
    return command


def _options_of(kind: type) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [
        _parameter(each.name, hints[each.name], inspect.Parameter.empty if each.default is MISSING else each.default)
        for each in fields(kind)
    ]


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _answer(run: Callable[[], Answer], as_json: bool, say: Say) -> None:
    """Run a command, print its answer, and exit with its code. All other output goes to stderr, not to stdout."""
    try:
        with contextlib.redirect_stdout(sys.stderr), _plain_warnings(say):
            answer = run()
        text = _json(answer.data) if as_json else ""
    except ConvLoraError as error:
        message = say(str(error))
        if as_json:
            typer.echo(_json({"error": type(error).__name__, "message": message}))
        typer.echo(f"{type(error).__name__}: {message}", err=True)
        raise typer.Exit(REFUSED) from None
    except (typer.Exit, typer.BadParameter):
        raise
    except Exception:
        traceback.print_exc()
        raise typer.Exit(OWN_ERROR) from None
    if as_json:
        typer.echo(text)
    else:
        _show(answer.shown, say)
    raise typer.Exit(answer.code)


def in_options(text: str, flags: Mapping[str, str]) -> str:
    """Return a text of the library in which the command's options replace Python's arguments.

    ``target_modules=[nn.Conv2d, nn.Linear]`` becomes ``--target type:Conv2d --target type:Linear``.

    Args:
        text: an error, a warning or a note of the library.
        flags: the command's options, by the names of the library's arguments.
    """
    for python, shell in WORDS.items():
        text = text.replace(python, shell)
    return _ARGUMENT.sub(lambda found: _option(found, flags), text)


def _option(found: re.Match[str], flags: Mapping[str, str]) -> str:
    name, value = found[1], found[2]
    if name == "check_base" and "any_base" in flags:
        return flags["any_base"]
    flag = flags.get(name, "")
    if not flag.startswith("--") or value == "()" or (value is None and "_" not in name):
        return found[0] + " in Python" * (value == "()" or (name in IN_PYTHON and value is not None))
    if value in (None, "None", "True", "False"):
        return f"no {flag}" if value == "False" else flag
    items = (item.strip("'\"").replace("\\\\", "\\") for item in _ITEM.findall(value))
    return " ".join(f"{flag} {shlex.quote(re.sub('^nn[.]', 'type:', item))}" for item in items)


@contextlib.contextmanager
def _plain_warnings(say: Say) -> Iterator[None]:
    """Print each warning as one line on stderr, without its line of code."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: typer.echo(f"warning: {say(str(message))}", err=True)
        yield


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2, allow_nan=False)


def _show(shown: Sequence[str | Table], say: Say) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 1000  # do not wrap lines that go to a file or another program
    for each in shown:
        if isinstance(each, str):
            each = re.sub("^note: .*", lambda note: say(note[0]), each, flags=re.M)
            console.print(Text(each), soft_wrap=True)
        else:
            console.print(each)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], align: str, title: str | None = None) -> Table:
    """Return a table without rules; ``align`` holds l (left) or r (right) for each column."""
    made = Table(box=None, title=title, title_justify="left", pad_edge=False, header_style="bold")
    for head, side in zip(heads, align, strict=True):
        made.add_column(head, justify="left" if side == "l" else "right", overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made
