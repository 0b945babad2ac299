"""Read methods from YAML, check every key, and find methods by name.

A file holds ``about``, and any of ``base`` (the method that it starts from), ``adapt``, ``augment``, ``normalise`` and
``predict``; `method` documents their keys. Errors name the file, the key and the remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from ..errors import ExampleError
from .method import MODIFIERS, Adapt, Augment, Method, Predict, modified

FOLDER = Path(__file__).parent
SECTIONS: dict[str, type[Any]] = {"adapt": Adapt, "augment": Augment, "predict": Predict}
# The least allowed value of each number.
LEAST = {"rank": 1, "alpha": 1e-6, "lr_ratio": 1e-6, "stain_jitter": 0.0}


def names() -> list[str]:
    """The names of the methods that come with the example."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find_methods(wanted: Sequence[str]) -> list[Method]:
    """The methods of these names, in this order; raises ExampleError at an unknown or repeated name, or at none."""
    methods = [find_method(name) for name in wanted if name]
    if not methods:
        raise ExampleError(f"no method is given; known: {', '.join(names())}.")
    found = [method.name for method in methods]
    if len(set(found)) < len(found):
        raise ExampleError(f"--methods {','.join(wanted)} names a method twice; name each once.")
    return methods


def find_method(name: str) -> Method:
    """Find a method by its name in ``methods/`` or its YAML file, followed by any number of ``+modifier``.

    Raises:
        ExampleError: an unknown name or modifier, or a fault in its file.
    """
    base, *modifiers = name.split("+")
    path = Path(base) if base.endswith((".yaml", ".yml")) else FOLDER / f"{base}.yaml"
    if not path.is_file():
        known = ", ".join(names())
        raise ExampleError(f"unknown method {base}; known: {known}, or a .yaml file of your own.")
    unknown = [modifier for modifier in modifiers if modifier not in MODIFIERS]
    if unknown:
        raise ExampleError(f"{name}: unknown modifier {unknown[0]!r}; known: {', '.join(MODIFIERS)}.")
    return modified(read_method(path), modifiers)


def read_yaml(path: Path, called: str, wanted: str) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Args:
        path: path of the file.
        called: the file's name in errors.
        wanted: the remedy in errors.

    Raises:
        ExampleError: no such file, not YAML, or no keys in it.
    """
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as fault:
        raise ExampleError(f"{called}: cannot be read as YAML ({' '.join(str(fault).split())}).") from fault
    if not isinstance(stored, dict):
        raise ExampleError(f"{called}: holds {stored!r}; {wanted}.")
    return stored


@cache
def read_method(path: Path) -> Method:
    """A method from its file.

    Raises:
        ExampleError: not YAML; an unknown key; a value of the wrong type or out of range; an unknown base.
    """
    stored = read_yaml(path, str(path), "write keys such as `about: my method`")
    return method_from(stored, path.stem, path)


def method_from(stored: Mapping[str, Any], name: str, path: Path) -> Method:
    """A method from plain values, each checked; ``path`` is named in errors."""
    known = ("about", "base", *SECTIONS, "normalise")
    for key in stored:
        _check_known(key, known, key, path)
    base = _base(stored, path)
    values: dict[str, Any] = {
        key: _section(cls, stored.get(key, {}), getattr(base, key), key, path) for key, cls in SECTIONS.items()
    }
    about, normalise = stored.get("about", ""), stored.get("normalise", base.normalise)
    _check(about, str, "about", path)
    if not about:
        raise ExampleError(f"{path}: about: is missing; describe the method in a few words.")
    _check(normalise, get_type_hints(Method)["normalise"], "normalise", path)
    method = Method(name, about, normalise=normalise, **values)
    if method.adapt.lr_ratio != 1 and method.adapt.trains != "lora":
        raise ExampleError(f"{path}: adapt.lr_ratio: trains: {method.adapt.trains} has no factors; leave it out.")
    shared = "base" in stored and method.training_parts() == base.training_parts()
    return dataclasses.replace(method, training=base.training if shared else name)


def as_plain(method: Method) -> dict[str, Any]:
    """The method as plain values, without its name: the inverse of `method_from`."""
    return {"about": method.about, **method.training_parts(), "predict": dataclasses.asdict(method.predict)}


def _base(stored: Mapping[str, Any], path: Path) -> Method:
    if "base" not in stored:
        return Method("", "")
    _check(stored["base"], str, "base", path)
    file = path.parent / f"{stored['base']}.yaml"
    file = file if file.is_file() else FOLDER / file.name
    if not file.is_file():
        raise ExampleError(f"{path}: base: there is no method {stored['base']!r}; known: {', '.join(names())}.")
    if file.resolve() == path.resolve():
        raise ExampleError(f"{path}: base: names the file itself; name another method or leave it out.")
    return read_method(file)


def _section(cls: type[Any], stored: Any, base: Any, key: str, path: Path) -> Any:
    if not isinstance(stored, dict):
        raise ExampleError(f"{path}: {key}: holds {stored!r}; write keys below it: {', '.join(get_type_hints(cls))}.")
    hints = get_type_hints(cls)
    for name, value in stored.items():
        _check_known(name, tuple(hints), f"{key}.{name}", path)
        _check(value, hints[name], f"{key}.{name}", path)
    return dataclasses.replace(base, **stored)


def _check_known(name: Any, known: Sequence[str], key: str, path: Path) -> None:
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ExampleError(f"{path}: {key}: unknown key; {hint}Known: {', '.join(known)}.")


def _check(value: Any, hint: Any, key: str, path: Path) -> None:
    """Raise unless the value has the type and is at least its least value."""
    allowed = _allowed(hint)
    literals = [choice for choice in allowed if not isinstance(choice, type)]
    kinds = [kind for kind in allowed if isinstance(kind, type)]
    fits = any(type(value) is type(choice) and value == choice for choice in literals) or any(
        type(value) is kind or (kind is float and type(value) is int) for kind in kinds
    )
    if not fits:
        words = [repr(choice) for choice in literals] + [_WORDS[kind] for kind in kinds]
        raise ExampleError(f"{path}: {key}: {value!r} is not allowed; write {' or '.join(words)}.")
    least = LEAST.get(key.rpartition(".")[2])
    if least is not None and value is not None and not least <= value < float("inf"):
        raise ExampleError(f"{path}: {key}: {value!r} is too small or not a number; write {least:g} or more.")


_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def _allowed(hint: Any) -> list[Any]:
    """The types and literal values of a hint."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return [each for arg in get_args(hint) for each in _allowed(arg)]
    return [hint]
