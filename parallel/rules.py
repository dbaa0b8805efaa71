"""Axis rules: which logical axis of an array (`heads`, `vocab`) lies on which axis of the mesh."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from .. import InputError
from .mesh import MESH_AXES

Names = tuple[str | None, ...]
AxisTable = Sequence[tuple[str, Names]]
Fallback = Callable[[str, tuple[int, ...]], Names | None]


@dataclass(frozen=True)
class AxisRules:
    """A map from logical axis to mesh axis, to several mesh axes (major first), or to None: not split.

    Changing where things lie is changing this map (the idea of T5X's logical axis rules). What T5X and Flax
    let pass in silence is an error here: an unknown name, and two axes of one array on the same mesh axis.
    """

    rules: Mapping[str, str | tuple[str, ...] | None]

    def __post_init__(self) -> None:
        for name in self.rules:
            for axis in self.mesh_axes(name):
                if axis not in MESH_AXES:
                    raise InputError(
                        f"rule {name!r} -> {axis!r}: no such mesh axis; the axes are {', '.join(MESH_AXES)}"
                    )

    def __hash__(self) -> int:
        return hash(tuple((name, self.mesh_axes(name)) for name in sorted(self.rules)))

    def replace(self, **changes: str | tuple[str, ...] | None) -> AxisRules:
        """These rules with some changed or added: `DEFAULT_RULES.replace(vocab=None)`."""
        return AxisRules({**self.rules, **changes})

    def mesh_axes(self, name: str | None, path: str = "") -> tuple[str, ...]:
        """The mesh axes of one logical axis; None (an axis without a name) has none."""
        if name is None:
            return ()
        if name not in self.rules:
            where = f"{path}: " if path else ""
            raise InputError(
                f"{where}unknown logical axis {name!r}; the rules know {', '.join(sorted(self.rules))}"
            )
        axes = self.rules[name]
        return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)

    def spec(self, names: Names, shape: Sequence[int], mesh: Mesh, path: str = "array") -> PartitionSpec:
        """Where an array of this shape with these logical axes lies on the mesh.

        Mesh axes of size 1 and trailing unsplit dimensions are left out, so equal placements compare equal.

        Raises InputError for a name or mesh axis that does not exist, for two logical axes on one mesh axis,
        and for a dimension that its mesh axes do not divide.
        """
        if len(names) != len(shape):
            raise InputError(
                f"{path}: shape {tuple(shape)} has {len(shape)} axes, {len(names)} names: {names}"
            )
        taken: dict[str, str] = {}
        entries: list[tuple[str, ...]] = []
        for name, size in zip(names, shape):
            axes = self.mesh_axes(name, path)
            for axis in axes:
                if axis in taken:
                    raise InputError(
                        f"{path}: logical axes {taken[axis]!r} and {name!r} both lie on mesh axis {axis!r}; "
                        f"map one of them to None in the rules"
                    )
                taken[axis] = str(name)
            entries.append(split_axes(axes, mesh, path))
            _check_divides(path, name, size, entries[-1], mesh)
        return make_spec(entries)


DEFAULT_RULES = AxisRules(
    {
        "batch": ("pipe", "data", "fsdp", "expert"),
        "length": "context",
        "layers": "pipe",
        "width": None,
        "head_width": None,
        "embedding": None,
        "pooled": None,
        "positions": None,
        "types": None,
        "labels": None,
        "buckets": None,
        "choices": None,
        "vocab": "tensor",
        "heads": "tensor",
        "kv_heads": "tensor",
        "mlp": "tensor",
        "experts": "expert",
    }
)


def unnamed_delta(path: str, shape: tuple[int, ...]) -> Names | None:
    """No names for the leaves of a delta, which live below a `~name` component; None for any other leaf.

    Such a leaf is copied over `tensor`; ZeRO may still split it. It is the default `default` of `axis_names`.
    """
    return (None,) * len(shape) if any(part.startswith("~") for part in path.split("/")) else None


def axis_names(tree: Any, table: AxisTable, default: Fallback = unnamed_delta) -> Any:
    """The logical axes of every leaf: a tree of the same structure with a tuple of names per leaf.

    A row of the table is (pattern, names). The pattern is a regular expression that must match the end of
    the leaf's `/` path, from the start of a component: `mlp/up/kernel` matches `layers_3/mlp/up/kernel`.
    The first matching row counts. A leaf below a component `layers` with one dimension more than its row
    names is a stack of layers and gets ("layers", *names). A leaf that matches no row gets what
    `default(path, shape)` says.

    Raises InputError for a leaf that matches no row, and for one with another number of dimensions.
    """
    rows = [(re.compile(rf"(?:^|/)(?:{pattern})$"), tuple(names)) for pattern, names in table]

    def named(key_path: Any, leaf: Any) -> Names:
        path, shape = leaf_path(key_path), tuple(leaf.shape)
        names = next((names for pattern, names in rows if pattern.search(path)), None)
        if names is None:
            names = default(path, shape)
        if names is None:
            raise InputError(f"{path}: no row of the axis table matches this array of shape {shape}")
        if len(names) == len(shape) - 1 and "layers" in path.split("/"):
            names = ("layers", *names)
        if len(names) != len(shape):
            raise InputError(
                f"{path}: shape {shape} has {len(shape)} axes, the axis table names {len(names)}: {names}"
            )
        return names

    return jax.tree_util.tree_map_with_path(named, tree)


def leaf_path(key_path: Any) -> str:
    """A key path as `layers_3/mlp/up/kernel`."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def _check_divides(path: str, name: str | None, size: int, axes: tuple[str, ...], mesh: Mesh) -> None:
    parts = ways(mesh, axes)
    if size % parts:
        raise InputError(
            f"{path}: axis {name!r} of size {size} does not divide over {'×'.join(axes)}={parts}; "
            f"pad it to {-(-size // parts) * parts}, choose a mesh whose {'×'.join(axes)} divides {size}, "
            f"map {name!r} to None in the rules, or list the array in `replicate`"
        )


def split_axes(axes: Sequence[str], mesh: Mesh, path: str = "array") -> tuple[str, ...]:
    """Those of the mesh axes that split anything: an axis of size 1 does not."""
    for axis in axes:
        if axis not in mesh.shape:
            raise InputError(f"{path}: the mesh has no axis {axis!r}; it has {', '.join(mesh.axis_names)}")
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def ways(mesh: Mesh, axes: str | Sequence[str] | None) -> int:
    """Into how many parts these mesh axes split a dimension; the entry of a PartitionSpec is such axes."""
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[axis] for axis in names)


def make_spec(entries: Sequence[tuple[str, ...]]) -> PartitionSpec:
    """The shortest PartitionSpec with these mesh axes per dimension."""
    short: list[str | tuple[str, ...] | None] = [
        None if not axes else axes[0] if len(axes) == 1 else axes for axes in entries
    ]
    while short and short[-1] is None:
        short.pop()
    return PartitionSpec(*short)
