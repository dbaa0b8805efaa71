"""Frozen dataclasses that are pytrees: fields that hold numbers are structure, the rest are children."""

import dataclasses
import typing
from typing import Any, TypeVar, dataclass_transform

import jax
import numpy as np

T = TypeVar("T")
AnyArray = jax.Array | np.ndarray
_NUMBERS = (bool, int, float, str)


@dataclasses.dataclass(frozen=True)
class _Child:
    """Stands among the structure for a field whose value is a child."""


@dataclass_transform(frozen_default=True)
def structural(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass and a pytree: fields declared `int` are static, arrays are leaves.

    A field declared `int | AnyArray` goes by its value, so `Causal(offset=0)` compiles to a triangle known at
    trace time, while `Causal(offset=array)` is the same class with a traced offset. Rebuilding a node skips
    `__post_init__`: JAX rebuilds trees around tracers, shapes and placeholders alike.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    kinds = {name: _kinds(hint) for name, hint in typing.get_type_hints(cls).items()}

    def flatten(node: T) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        values = {name: getattr(node, name) for name in kinds}
        static = {name for name, value in values.items() if _is_static(kinds[name], value)}
        children = [(jax.tree_util.GetAttrKey(name), values[name]) for name in kinds if name not in static]
        return children, tuple(values[name] if name in static else _Child() for name in kinds)

    def unflatten(structure: tuple[Any, ...], children: Any) -> T:
        node, remaining = object.__new__(cls), iter(children)
        for name, value in zip(kinds, structure):
            object.__setattr__(node, name, next(remaining) if isinstance(value, _Child) else value)
        return node

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


def _kinds(hint: Any) -> set[bool]:
    """Whether the types a field may have are numbers, None apart."""
    options = typing.get_args(hint) if isinstance(hint, type(int | str)) else (hint,)
    return {option in _NUMBERS for option in options if option is not type(None)}


def _is_static(kinds: set[bool], value: Any) -> bool:
    return type(value) in _NUMBERS if len(kinds) == 2 else True in kinds
