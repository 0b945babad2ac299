"""Names and numbers as Markdown and YAML, in which nothing that a model is called becomes markup."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from ..errors import few


def table(head: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> list[str]:
    """A table; ``align`` holds an l or an r for each column."""
    bars = [{"l": ":--", "r": "--:"}[side] for side in align]
    return ["| " + " | ".join(row) + " |" for row in (head, bars, *rows)]


def sizes(shape: Iterable[int]) -> str:
    """A shape: 64×3×7×7."""
    return "×".join(map(str, shape))


def count(number: int, noun: str) -> str:
    """How many of something: 1 layer, 2 layers."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def shown(parts: Sequence[str]) -> str:
    """The first of the parts, and how many more there are."""
    return ", ".join(few(parts, "{} more"))


def joined(parts: Sequence[str]) -> str:
    """Parts as a sentence has them: a, b and c."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def cell(text: str) -> str:
    """Plain words for a table: nothing in them is markup."""
    return re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """A name as code; a bar would end a table's cell, a backtick the code."""
    return "`{}`".format(" ".join(text.split()).replace("|", "¦").replace("`", "'"))


def quoted(text: str) -> str:
    """A YAML string: JSON's are YAML's, where every character can be printed."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return json.dumps(printable, ensure_ascii=False)


def yaml_number(value: float) -> str:
    """As Python writes it, with the point that YAML 1.1 wants before an exponent."""
    text = repr(value)
    return text.replace("e", ".0e") if "e" in text and "." not in text else text
