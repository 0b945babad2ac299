"""The command line: ``convlora plan``, ``inspect``, ``diff``, ``merge``, ``convert``, ``extract``, ``shrink``, and
``bench``.

Each command builds a model or reads a file, calls the library, and prints the result. Typer and rich come with
``pip install 'convlora[cli]'``; the library needs neither, and they are imported only when a command runs.
"""

from __future__ import annotations

import sys


def main() -> None:
    """The ``convlora`` program."""
    try:
        from .app import app
    except ModuleNotFoundError as cause:
        if (cause.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        sys.exit(f"The convlora command needs {cause.name}: pip install 'convlora[cli]'. `import convlora` does not.")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that has no × prints ? instead of failing
    app(prog_name="convlora")
