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
    """What the generated class says of its module where the base's is not torch's; None: the base's."""
    _convlora_mixin: ClassVar[type[Swapped]]
    _convlora_base: ClassVar[type[nn.Module]]
    _convlora_original: ClassVar[type[nn.Module]]
    """The class before any swap."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        create, arguments, *state = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        if is_swapped(self):  # else another library subclassed our class: how to rebuild that is its affair
            first, *outer = reversed([cls._convlora_mixin for cls in _swaps(type(self))])
            create, arguments = _rebuild, (first, original_class(cast(nn.Module, self)), *outer)
        return (create, arguments, *state)


def _rebuild(mixin: type[Swapped], base: type[nn.Module], *outer: type[Swapped]) -> object:
    cls = swapped_class(mixin, base)
    for each in outer:
        cls = swapped_class(each, cls)
    return cls.__new__(cls)


# Weak: parametrize makes a class of its own for each module, and none of them should outlive it.
_CLASSES: WeakValueDictionary[tuple[type[Swapped], type[nn.Module]], type[nn.Module]] = WeakValueDictionary()


def swapped_class(mixin: type[Swapped], base: type[nn.Module]) -> type[nn.Module]:
    """The one subclass of ``base`` with this mixin's behaviour."""
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
    """Whether the module's class is one of ours itself, not a subclass that another library put on top."""
    return "_convlora_mixin" in vars(type(module)) and isinstance(module, Swapped)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, or the one that it had before any :func:`swap`."""
    return cast("type[nn.Module]", vars(type(module)).get("_convlora_original", type(module)))


def class_below(module: nn.Module) -> type[nn.Module]:
    """The module's class, or the one that it had before the last :func:`swap`."""
    return cast(Swapped, module)._convlora_base if is_swapped(module) else type(module)


def _swaps(cls: type[Any]) -> Iterator[type[Swapped]]:
    """The generated classes, the last first: a head in fp32 that another adapter adapts is swapped twice."""
    while "_convlora_mixin" in vars(cls):
        yield cls
        cls = cls._convlora_base


def check_swappable(name: str, module: nn.Module, mixin: type[Swapped]) -> None:
    """Raise :class:`UnsupportedLayerError` where Python would not let this instance change its class."""
    cls = original_class(module)
    try:
        probe = object.__new__(cls)
        object.__setattr__(probe, "__class__", swapped_class(mixin, cls))
    except TypeError as cause:
        raise UnsupportedLayerError(f"{name}: {cls.__name__} cannot be adapted in place ({cause}).") from cause


def swap(module: nn.Module, mixin: type[Swapped]) -> None:
    """Give the module the mixin's behaviour; its own class comes after in the method resolution order."""
    module.__class__ = swapped_class(mixin, type(module))


def swap_over(module: nn.Module, mixin: type[Swapped]) -> None:
    """As :func:`swap`, from whatever class of ours it has by now: in one step, for threads that compute meanwhile.

    Raises:
        StateError: another library has put its own class on top of ours.
    """
    check_restorable(module)
    cls = swapped_class(mixin, class_below(module))
    if type(module) is not cls:
        module.__class__ = cls


def set_below(module: nn.Module, mixin: type[Swapped], is_there: bool) -> None:
    """Put a mixin below all others that a module has by now, or take it out from there; may be run again."""
    mixins = [each._convlora_mixin for each in _swaps(type(module)) if each._convlora_mixin is not mixin]
    cls = original_class(module)
    for each in (*([mixin] if is_there else []), *reversed(mixins)):
        cls = swapped_class(each, cls)
    if type(module) is not cls:
        module.__class__ = cls


def restore(module: nn.Module) -> None:
    """Give the module its original class back.

    Raises:
        StateError: another library has put its own class on top of ours (FSDP2 does); undo that first.
    """
    check_restorable(module)
    module.__class__ = class_below(module)


def check_restorable(module: nn.Module) -> None:
    """Raise the error of :func:`restore` without changing anything."""
    if isinstance(module, Swapped) and not is_swapped(module):
        raise StateError(
            f"The class of an adapted layer is now {type(module).__module__}.{type(module).__qualname__}, put there "
            "after convlora.inject. Undo that change first (unshard or unwrap the model), then call again."
        )
