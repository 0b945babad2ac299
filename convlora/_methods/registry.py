"""The registry of methods by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from .._layer.change import Change, Option
from ..errors import TargetError
from .dense import Dense
from .hira import HiRA
from .hra import HRA
from .ia3 import IA3, SSF
from .loha import LoHa
from .lokr import LoKr
from .lora import AnchoredLoRA, LoRA
from .oft import BOFT, OFT

M = TypeVar("M", bound=type[Change])

_OURS = (LoRA, AnchoredLoRA, Dense, LoHa, LoKr, HiRA, IA3, SSF, OFT, BOFT, HRA)
METHODS: dict[str, type[Change]] = {cls.method: cls for cls in _OURS}


def named_methods() -> tuple[str, ...]:
    """Return the methods that a user may name: all but the anchored one, which ``init`` selects."""
    return tuple(name for name in METHODS if name != AnchoredLoRA.method)


def register_method(cls: M) -> M:
    """Make a method of your own known by its name, to ``inject(method=...)`` and to files that have it.

    >>> @convlora.register_method
    ... class Scale(convlora.Change):
    ...     method = "scale"

    Args:
        cls: a subclass of :class:`convlora.Change`, which says what it has to have.

    Returns:
        The same class.

    Raises:
        TargetError: it is no such class, or another one has its name.
    """
    if not (isinstance(cls, type) and issubclass(cls, Change)):
        raise TargetError(f"{cls!r} is no subclass of convlora.Change.")
    name = getattr(cls, "method", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise TargetError(f"{cls.__name__}.method={name!r}; it must be a name.")
    there = METHODS.get(name)
    if there is not None and f"{there.__module__}.{there.__qualname__}" != f"{cls.__module__}.{cls.__qualname__}":
        raise TargetError(f"method {name!r} is {there.__module__}.{there.__qualname__}; choose another name.")
    METHODS[name] = cls
    return cls


def method_for(method: str, init: str) -> type[Change]:
    """The class of this method that begins in this way; PiSSA's and OLoRA's is another than plain LoRA's.

    Raises:
        TargetError: there is none.
    """
    named = METHODS[method]
    for cls in (named, *METHODS.values()):
        if issubclass(cls, named) and init in cls.inits:
            return cls
    data = " init_data mean init='eva'." if init == "eva" else ""
    raise TargetError(
        f"init={init!r} is not an init of method={method!r}, which has {', '.join(named.inits)}.{data} "
        "Leave it out, or use another method. Nothing was changed."
    )


def check_options(method: str, options: Mapping[str, Option]) -> None:
    """Raise TargetError where the method has no such option, or the value is of another type than its default."""
    defaults = METHODS[method].defaults
    for name, value in options.items():
        if name not in defaults:
            known = ", ".join(defaults) or "none"
            raise TargetError(f"method_options names {name!r}; method={method!r} has {known}.")
        if type(value) is not type(defaults[name]):
            wanted = type(defaults[name]).__name__
            raise TargetError(f"method_options: {name}={value!r} of method={method!r}; it must be of type {wanted}.")
