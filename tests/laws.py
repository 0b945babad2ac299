"""Hypothesis as the tests use it. Without it the tests of properties are skipped, in words, and all others run."""

from __future__ import annotations

from typing import Any

import pytest

try:
    import hypothesis
    import hypothesis.strategies as st
    from hypothesis import assume, given
except ImportError:

    class _Absent:
        """Stands for every strategy, and for every function that makes one."""

        def __getattr__(self, name: str) -> _Absent:
            return self

        def __call__(self, *_: Any, **__: Any) -> _Absent:
            return self

        __or__ = __call__

    hypothesis, st, assume = None, _Absent(), _Absent()

    def given(*_: Any, **__: Any) -> pytest.MarkDecorator:
        return pytest.mark.skip(reason="needs hypothesis: pip install 'convlora[test]'")


__all__ = ["assume", "at_most", "begin", "given", "st"]

EXAMPLES = {"quick": 10, "ci": 60}
"""How many cases of each property a profile tries: every run, and the full one."""


def begin(profile: str) -> None:
    """Use a profile, before the tests are collected. No deadline: it would test how busy the machine is."""
    if hypothesis is not None:
        hypothesis.settings.register_profile(
            profile, deadline=None, max_examples=EXAMPLES[profile], derandomize=True, print_blob=True
        )
        hypothesis.settings.load_profile(profile)


def at_most(examples: int, **more: Any) -> Any:
    """For a property whose cases take long: no more of them than this in any profile. ``more`` is hypothesis' own."""
    if hypothesis is None:
        return lambda test: test
    return hypothesis.settings(max_examples=min(examples, hypothesis.settings.default.max_examples), **more)
