"""What the site makes of two habits of the docstrings; mkdocs.yml names this file.

``:func:`convlora.merge``` becomes a link, and lines that begin with ``>>>`` a block of code. An extension of griffe,
which reads the docstrings for mkdocstrings.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod):`~?([\w.]+)`")
_EXAMPLE = re.compile(r"^(?:(?:>>>|\.\.\.) ?[^\n]*(?:\n|\Z))+", re.MULTILINE)


def _linked(role: re.Match[str]) -> str:
    name = role[1]
    return f"[`{name}`][{name}]" if name.startswith("convlora.") else f"`{name}`"


def _fenced(example: re.Match[str]) -> str:
    code = re.sub(r"^(?:>>>|\.\.\.) ?", "", example[0], flags=re.MULTILINE)
    return f"```python\n{code.rstrip()}\n```\n"


class Roles(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe once for each object."""
        if obj.docstring:
            obj.docstring.value = _EXAMPLE.sub(_fenced, _ROLE.sub(_linked, obj.docstring.value))
