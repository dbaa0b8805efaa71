"""Frozen dataclasses to canonical JSON text and back.

The text is what a run's identity is hashed from, so equal configurations must give equal text: keys are
sorted, every field is written (a changed default is a changed run), a class is known by its name and not by
the module it lives in, and an integer in a field that is annotated `float` is written as a float.
"""

import dataclasses
import enum
import inspect
import json
import math
from collections.abc import Mapping
from pathlib import PurePath
from types import ModuleType
from typing import Any

from ... import InputError

CLASS, ENUM, FUNCTION = "_class", "_enum", "_function"


def encode(value: Any, where: str = "config") -> Any:
    """`value` as JSON types: dataclasses become objects with their class name, enums and functions names.

    `where` is the dotted name used in the InputError that an unstorable value (an array, a lambda) raises.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        fields = {name: encode(_as_annotated(value, name), f"{where}.{name}") for name in names}
        return {CLASS: type(value).__name__, **fields}
    if isinstance(value, enum.Enum):
        return {ENUM: f"{type(value).__name__}.{value.name}"}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, PurePath):
        return value.as_posix()
    if isinstance(value, Mapping):
        return {_key(key, where): encode(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item, f"{where}.{index}") for index, item in enumerate(value)]
    if isinstance(value, set | frozenset):
        return sorted((encode(item, where) for item in value), key=json.dumps)
    return _named(value, where)


def decode(data: Any, named: Mapping[str, Any], where: str = "config") -> Any:
    """The inverse of `encode`: `named` maps the class, enum and function names that may occur to objects.

    Lists come back as tuples, which is what frozen configurations hold. An unknown name and fields that the
    class does not take raise InputError.
    """
    if isinstance(data, list):
        return tuple(decode(item, named, f"{where}.{index}") for index, item in enumerate(data))
    if not isinstance(data, dict):
        return data
    if ENUM in data:
        kind, _, member = data[ENUM].partition(".")
        return _look_up(kind, named, where)[member]
    if FUNCTION in data:
        return _look_up(data[FUNCTION], named, where)
    values = {key: decode(item, named, f"{where}.{key}") for key, item in data.items() if key != CLASS}
    if CLASS not in data:
        return values
    kind = _look_up(data[CLASS], named, where)
    taken = {field.name for field in dataclasses.fields(kind) if field.init}
    if extra := sorted(set(values) - taken):
        known = ", ".join(sorted(taken))
        raise InputError(f"{where}: {data[CLASS]} has no field {extra[0]!r}; its fields: {known}")
    return kind(**values)


def to_text(config: Any) -> str:
    """Canonical JSON of a configuration, indented for people, with a final newline."""
    return json.dumps(encode(config), sort_keys=True, indent=2, ensure_ascii=False) + "\n"


def from_text(text: str, named: Mapping[str, Any]) -> Any:
    """The configuration whose `to_text` is `text`."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"config: line {error.lineno} is not JSON: {error.msg}") from None
    return decode(data, named)


def names_in(*modules: ModuleType) -> dict[str, Any]:
    """Every dataclass, enum and function that the given modules define or re-export, by name."""
    found: dict[str, Any] = {}
    for module in modules:
        for name, item in vars(module).items():
            is_enum = inspect.isclass(item) and issubclass(item, enum.Enum)
            is_dataclass = inspect.isclass(item) and dataclasses.is_dataclass(item)
            if is_enum or is_dataclass or inspect.isfunction(item):
                found[name] = item
    return found


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """Encoded data as one level: dotted field name to scalar, list or null.

    A nested class shows as its own entry, so that `mlp: GatedMLP` against `mlp: MLP` is seen as a difference.
    """
    if not isinstance(data, Mapping):
        return {prefix: data}
    if set(data) & {ENUM, FUNCTION}:
        return {prefix: next(iter(data.values()))}
    flat: dict[str, Any] = {}
    for key, item in data.items():
        if key != CLASS:
            flat.update(flatten(item, f"{prefix}.{key}" if prefix else key))
        elif prefix:
            flat[prefix] = item
    return flat


def _as_annotated(config: Any, name: str) -> Any:
    """The field's value; an integer where the annotation allows floats and no integers becomes a float."""
    value = getattr(config, name)
    annotation = next(str(field.type) for field in dataclasses.fields(config) if field.name == name)
    only_float = "float" in annotation and "int" not in annotation and "[" not in annotation
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if only_float and is_integer and math.isfinite(value) else value


def _key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise InputError(f"{where}: key {key!r} is a {type(key).__name__}; stored mappings have string keys")
    return key


def _named(value: Any, where: str) -> dict[str, str]:
    name = getattr(value, "__name__", "")
    if callable(value) and name.isidentifier():
        return {FUNCTION: name}
    kind = type(value).__name__
    raise InputError(
        f"{where}: a {kind} cannot be stored in a configuration; use numbers, text, tuples or dataclasses"
    )


def _look_up(name: str, named: Mapping[str, Any], where: str) -> Any:
    if name not in named:
        raise InputError(f"{where}: unknown class or function {name!r}; known: {', '.join(sorted(named))}")
    return named[name]
