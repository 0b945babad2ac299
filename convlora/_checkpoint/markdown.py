"""Names and numbers as Markdown and YAML; no name of a model or layer becomes markup."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from ..errors import few


def table(head: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> list[str]:
    """Return the lines of a table; ``align`` holds an l (left) or an r (right) for each column."""
    bars = [{"l": ":--", "r": "--:"}[side] for side in align]
    return ["| " + " | ".join(row) + " |" for row in (head, bars, *rows)]


def sizes(shape: Iterable[int]) -> str:
    """Return a shape as text: 64×3×7×7."""
    return "×".join(map(str, shape))


def count(number: int, noun: str) -> str:
    """Return a number with its noun: 1 layer, 2 layers."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def shown(parts: Sequence[str]) -> str:
    """Return the first parts of a list and the number of those left out."""
    return ", ".join(few(parts, "{} more"))


def joined(parts: Sequence[str]) -> str:
    """Return parts as an enumeration: a, b and c."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def cell(text: str) -> str:
    """Return text for a table's cell, with its markup escaped."""
    return re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """Return a name as code, without bars and backticks, which would end the cell or the code."""
    return "`{}`".format(" ".join(text.split()).replace("|", "¦").replace("`", "'"))


def quoted(text: str) -> str:
    """Return a YAML string; a JSON string of printable characters is one."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return json.dumps(printable, ensure_ascii=False)


def yaml_number(value: float) -> str:
    """Return a number as Python writes it, with the decimal point that YAML 1.1 needs before an exponent."""
    text = repr(value)
    return text.replace("e", ".0e") if "e" in text and "." not in text else text
