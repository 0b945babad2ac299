"""The public surface: names, signatures and fields, so that a change to them is deliberate; and its types, for mypy.

``tests/api.txt`` is what was promised. After a change that is meant, write it anew and say so in CHANGELOG.md::

    python tests/test_api.py > tests/api.txt
"""

import contextlib
import dataclasses
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import need

import convlora

PROMISED = Path(__file__).with_name("api.txt")
CONSUMER = Path(__file__).with_name("consumer.py")


def surface() -> str:
    """Every public name with its signature, a class with its fields and public members, an error with its base."""
    modules = {"convlora": convlora}
    with contextlib.suppress(ImportError):
        modules["convlora.peft"] = importlib.import_module("convlora.peft")
    lines = []
    for prefix, module in modules.items():
        names = module.__all__ if hasattr(module, "__all__") else ["from_peft", "register", "to_peft"]
        for name in names:
            lines += described(f"{prefix}.{name}", getattr(module, name))
    return "\n".join(lines) + "\n"


def described(name: str, found: object) -> list[str]:
    if not isinstance(found, type):
        return [f"{name}{signature(found)}"]
    if issubclass(found, Exception):
        return [f"{name}({found.__bases__[0].__name__})"]
    lines = [f"{name}: class"]
    if dataclasses.is_dataclass(found):
        lines += [f"  {field.name}: {field.type}" for field in dataclasses.fields(found)]
    for member, value in vars(found).items():
        if member.startswith("_") or member in getattr(found, "__dataclass_fields__", {}):
            continue
        if isinstance(value, property):
            lines.append(f"  {member} -> {value.fget.__annotations__.get('return')}")
        elif callable(value) or isinstance(value, classmethod):
            lines.append(f"  {member}{signature(getattr(found, member))}")
    return lines


def signature(function: object) -> str:
    """As it is written, one parameter a line where there are many; types as in the source."""
    found = inspect.signature(function)
    parts, kinds = [], [p.kind for p in found.parameters.values()]
    for p in found.parameters.values():
        if p.kind is p.KEYWORD_ONLY and "*" not in parts and inspect.Parameter.VAR_POSITIONAL not in kinds:
            parts.append("*")
        default = "" if p.default is p.empty else f" = {p.default!r}"
        parts.append(f"{p.name}: {p.annotation}{default}" if p.annotation is not p.empty else f"{p.name}{default}")
    inside = ", ".join(parts)
    if len(inside) > 90:
        inside = "\n    " + ",\n    ".join(parts) + ",\n"
    return f"({inside}) -> {found.return_annotation}"


def test_the_public_surface_is_the_promised_one():
    need("peft")
    assert surface() == PROMISED.read_text(encoding="utf-8"), "see the head of tests/test_api.py"


@pytest.mark.thorough
def test_a_consumer_is_checked_strictly():
    """The types that users see, where the library is installed: no Any leaks, and mistakes are found."""
    need("mypy")
    answer = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--warn-unused-ignores",
            "--no-incremental",
            "--config-file",
            os.devnull,
            "--follow-imports",
            "silent",
            str(CONSUMER),
        ],
        capture_output=True,
        text=True,
        cwd=Path(convlora.__file__).parents[1],
    )
    assert answer.returncode == 0, answer.stdout


if __name__ == "__main__":
    print(surface(), end="")
