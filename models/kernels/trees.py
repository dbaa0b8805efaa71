"""Frozen dataclasses that are pytrees: Python numbers are structure, the rest are leaves or subtrees."""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax
import numpy as np

T = TypeVar("T")
AnyArray = jax.Array | np.ndarray
_STRUCTURE = (bool, int, float, str, type(None))


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """Marks, among the structure, a field whose value is a child."""


def _flatten(node: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
    children: list[tuple[Any, Any]] = []
    structure: list[Any] = []
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if isinstance(value, _STRUCTURE):
            structure.append(value)
        else:
            structure.append(_Leaf())
            children.append((jax.tree_util.GetAttrKey(field.name), value))
    return children, tuple(structure)


@dataclass_transform(frozen_default=True)
def structural(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass and a pytree whose numbers, strings and None are static.

    So `Causal(offset=0)` compiles to a triangle known at trace time, while `Causal(offset=array)`
    is the same class with a traced offset. Rebuilding a node skips `__post_init__`: JAX rebuilds
    trees around tracers, shapes and placeholders alike.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)

    def unflatten(structure: tuple[Any, ...], children: Any) -> T:
        node, remaining = object.__new__(cls), iter(children)
        for field, value in zip(dataclasses.fields(cls), structure):  # type: ignore[arg-type]
            object.__setattr__(node, field.name, next(remaining) if isinstance(value, _Leaf) else value)
        return node

    jax.tree_util.register_pytree_with_keys(cls, _flatten, unflatten)
    return cls
