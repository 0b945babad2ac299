"""Changing what a module does by changing its class in place, and back.

The instance stays the same object with the same attributes, hooks and state-dict keys; only its class becomes a
generated subclass ``(mixin, original class)``. ``docs/design.md`` says why this and not a wrapper.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, cast
from weakref import WeakValueDictionary

from torch import nn

from ..errors import StateError, UnsupportedLayerError


class Swapped:
    """Base of the mixins. Pickle and copy name the original class and the mixin, not the generated class."""

    _convlora_prefix: ClassVar[str] = "Swapped"
    _convlora_module: ClassVar[str | None] = None
    """The generated class's ``__module__`` if the base class is not torch's; None: the base class's."""
    _convlora_mixin: ClassVar[type[Swapped]]
    _convlora_base: ClassVar[type[nn.Module]]
    _convlora_original: ClassVar[type[nn.Module]]
    """The class before any swap."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        create, arguments, *state = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        if is_swapped(self):  # else another library has subclassed the generated class, and must rebuild it itself
            first, *outer = reversed([cls._convlora_mixin for cls in _swaps(type(self))])
            create, arguments = _rebuild, (first, original_class(cast(nn.Module, self)), *outer)
        return (create, arguments, *state)


def _rebuild(mixin: type[Swapped], base: type[nn.Module], *outer: type[Swapped]) -> object:
    cls = swapped_class(mixin, base)
    for each in outer:
        cls = swapped_class(each, cls)
    return cls.__new__(cls)


# Weak references: parametrize makes a class for each module, which should not outlive the module.
_CLASSES: WeakValueDictionary[tuple[type[Swapped], type[nn.Module]], type[nn.Module]] = WeakValueDictionary()


def swapped_class(mixin: type[Swapped], base: type[nn.Module]) -> type[nn.Module]:
    """Return the generated subclass of ``base`` with this mixin; there is one for each pair."""
    cls = _CLASSES.get((mixin, base))
    if cls is None:
        inside_torch = base.__module__.startswith("torch.nn") or mixin._convlora_module is None
        body = {"__module__": base.__module__ if inside_torch else mixin._convlora_module, "__doc__": base.__doc__}
        original = vars(base).get("_convlora_original", base)
        own = {"_convlora_mixin": mixin, "_convlora_base": base, "_convlora_original": original}
        metaclass: Any = type(base)
        cls = _CLASSES[mixin, base] = metaclass(mixin._convlora_prefix + base.__name__, (mixin, base), body | own)
    return cls


def is_swapped(module: object) -> bool:
    """Return whether the module's class is a generated one itself, and not another library's subclass of one."""
    return "_convlora_mixin" in vars(type(module)) and isinstance(module, Swapped)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the module's class before any :func:`swap`."""
    return cast("type[nn.Module]", vars(type(module)).get("_convlora_original", type(module)))


def class_below(module: nn.Module) -> type[nn.Module]:
    """Return the module's class before the last :func:`swap`."""
    return cast(Swapped, module)._convlora_base if is_swapped(module) else type(module)


def _swaps(cls: type[Any]) -> Iterator[type[Swapped]]:
    """Yield the generated classes, the last first. A module can have two: a head in fp32 that is also adapted."""
    while "_convlora_mixin" in vars(cls):
        yield cls
        cls = cls._convlora_base


def check_swappable(name: str, module: nn.Module, mixin: type[Swapped]) -> None:
    """Raise :class:`UnsupportedLayerError` if Python cannot change the class of this instance."""
    cls = original_class(module)
    try:
        probe = object.__new__(cls)
        object.__setattr__(probe, "__class__", swapped_class(mixin, cls))
    except TypeError as cause:
        raise UnsupportedLayerError(f"{name}: {cls.__name__} cannot be adapted in place ({cause}).") from cause


def swap(module: nn.Module, mixin: type[Swapped]) -> None:
    """Change the module's class to a subclass with this mixin, which comes first in the method resolution order."""
    module.__class__ = swapped_class(mixin, type(module))


def swap_over(module: nn.Module, mixin: type[Swapped]) -> None:
    """Replace the last mixin by this one in a single assignment, so that other threads never see the plain class.

    Raises:
        StateError: another library has subclassed the generated class.
    """
    check_restorable(module)
    cls = swapped_class(mixin, class_below(module))
    if type(module) is not cls:
        module.__class__ = cls


def set_below(module: nn.Module, mixin: type[Swapped], is_there: bool) -> None:
    """Add a mixin below all others of a module, or remove it. May be run again."""
    mixins = [each._convlora_mixin for each in _swaps(type(module)) if each._convlora_mixin is not mixin]
    cls = original_class(module)
    for each in (*([mixin] if is_there else []), *reversed(mixins)):
        cls = swapped_class(each, cls)
    if type(module) is not cls:
        module.__class__ = cls


def restore(module: nn.Module) -> None:
    """Undo the last :func:`swap`.

    Raises:
        StateError: another library has subclassed the generated class (FSDP2 does); undo that first.
    """
    check_restorable(module)
    module.__class__ = class_below(module)


def check_restorable(module: nn.Module) -> None:
    """Raise the error of :func:`restore`, and change nothing."""
    if isinstance(module, Swapped) and not is_swapped(module):
        raise StateError(
            f"The class of an adapted layer is now {type(module).__module__}.{type(module).__qualname__}, put there "
            "after convlora.inject. Undo that change first (unshard or unwrap the model), then call again."
        )
