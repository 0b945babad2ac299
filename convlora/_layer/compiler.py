"""What must not be compiled, without importing torch's compiler, which takes as long as torch itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


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
