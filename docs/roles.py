"""What the docstrings' :func:`convlora.merge` and :class:`ValueError` become in the site: links, or plain code.

An extension of griffe, which reads the docstrings for mkdocstrings; mkdocs.yml names it.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod):`~?([\w.]+)`")


def _linked(match: re.Match[str]) -> str:
    name = match[1]
    return f"[`{name}`][{name}]" if name.startswith("convlora.") else f"`{name}`"


class Roles(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe once for each object."""
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(_linked, obj.docstring.value)
