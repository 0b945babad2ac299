"""Whatever else touches an injected model: a table of situations, each with its right result.

A row is a function: its decorator says who does what to the model and what is right then, its body shows it. Either the
model predicts, trains and saves what it should, or the call is refused with the model whole.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

Row = Callable[[], None]
ROWS: list[object] = []


def situation(what: str, right: str, *needs: str, marks: tuple[pytest.MarkDecorator, ...] = ()) -> Callable[[Row], Row]:
    """A row of the table: ``what`` is done to an injected model, ``right`` is the result; ``needs`` names packages."""

    def add(row: Row) -> Row:
        def run() -> None:
            for package in needs:
                pytest.importorskip(package)
            row()

        ROWS.append(pytest.param(run, id=f"{what}: {right}", marks=marks))
        return row

    return add


# --- 1. norms -----------------------------------------------------------------------------------------------------


# --- 2. flags, heads and modules ----------------------------------------------------------------------------------


# --- 3. state dicts -----------------------------------------------------------------------------------------------


# --- 4. averages --------------------------------------------------------------------------------------------------


# --- 5. what is trained and what is saved -------------------------------------------------------------------------


# --- 6. precision -------------------------------------------------------------------------------------------------


# --- 7. several processes -----------------------------------------------------------------------------------------


# --- 8. forwards on the instance ----------------------------------------------------------------------------------


# --- 9. the kept weight -------------------------------------------------------------------------------------------


# --- 10. autograd and tracing -------------------------------------------------------------------------------------


# --- 11. smaller ones ---------------------------------------------------------------------------------------------


# --- the table ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
def test_situation(row: Row) -> None:
    row()
