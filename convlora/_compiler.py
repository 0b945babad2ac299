"""What must not be compiled, without importing torch's compiler, which takes as long as torch itself."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])
IS_BLIND = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 5)
"""torch 2.4's compiled code does not notice that a layer's class, or the route of its samples, has changed."""


def uncompiled(function: F) -> F:
    """As ``torch.compiler.disable``, but the compiler is imported at the first call, not at this one.

    So does torch for functions of its own (``torch._compile``); an optimizer imports it, too.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        disabled = getattr(function, "_convlora_uncompiled", None)
        if disabled is None:
            disabled = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
            function._convlora_uncompiled = disabled  # type: ignore[attr-defined]
        return disabled(*args, **kwargs)

    return cast(F, run)


def forget_compiled() -> None:
    """Where torch would not notice what has changed, drop what it has compiled."""
    if IS_BLIND and "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def hold_compiler(wanted: bool) -> None:
    """Where torch would not notice routes, compile nothing while there are any, and forget what was compiled."""
    if not IS_BLIND:
        return
    import torch._dynamo

    if torch._dynamo.config.disable != wanted:
        torch._dynamo.config.disable = wanted
        torch._dynamo.reset()
