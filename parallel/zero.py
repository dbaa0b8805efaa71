"""ZeRO as shardings: what the data-parallel copies of a model need not all hold is split over them.

The stages of Rajbhandari et al. 2020 (arXiv:1910.02054): 1 splits the optimizer state, 2 the gradients as
well, 3 the parameters as well. Nothing wraps the model or the optimizer: the compiler reads the shardings
of what goes in and comes out of the step, and puts reduce-scatters and all-gathers where they are needed.

Two mesh axes carry copies: `fsdp`, over which parameters, gradients and optimizer state are split at any
level (that is what the axis is for), and `data`, which the level decides about.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .. import InputError
from .rules import DEFAULT_RULES, AxisRules, Names, leaf_path, make_spec, split_axes, ways

LEVELS = (0, 1, 2, 3)
MINIMUM = 2**12  # elements; splitting less costs more in latency than it saves in memory


class Placement(NamedTuple):
    """Where arrays go: mesh, axis rules, ZeRO level, arrays never to split, size from which ZeRO splits.

    replicate   patterns as in the axis table; a matching array is copied whole to every device
    minimum     elements; ZeRO leaves smaller arrays alone
    """

    mesh: Mesh
    rules: AxisRules = DEFAULT_RULES
    zero: int = 0
    replicate: tuple[str, ...] = ()
    minimum: int = MINIMUM

    def axes(self, from_level: int) -> tuple[str, ...]:
        """The mesh axes that split what ZeRO splits from this level on."""
        if self.zero not in LEVELS:
            raise InputError(f"ZeRO level {self.zero!r}; the levels are 0, 1, 2, 3")
        return split_axes(("fsdp", "data") if self.zero >= from_level else ("fsdp",), self.mesh)

    def keeps_whole(self, path: str) -> bool:
        """Whether `replicate` names this array."""
        return any(re.search(rf"(?:^|/)(?:{pattern})$", path) for pattern in self.replicate)


def parameter_shardings(abstract: Any, names: Any, place: Placement) -> Any:
    """Shardings of the parameters; `names` is what `axis_names` returned for them."""
    return _shardings(abstract, names, place, place.axes(from_level=3))


def gradient_shardings(abstract: Any, names: Any, place: Placement) -> Any:
    """Shardings of the gradients, and of an accumulator of gradients."""
    return _shardings(abstract, names, place, place.axes(from_level=2))


def optimizer_shardings(state: Any, abstract: Any, names: Any, place: Placement) -> Any:
    """Shardings of the optimizer state (or of any tree that holds copies of the parameter tree).

    A leaf of the state belongs to the parameter whose path ends its own, if the shapes agree
    (`0/mu/mlp/up/kernel` to `mlp/up/kernel`): so Adam's moments, Lion's, Muon's, an average of the
    parameters, also inside `optax.masked` and `optax.multi_transform`, which leave holes in the tree. Such
    a leaf lies as its parameter, split further from level 1. Any other leaf (counters, Adafactor's factored
    moments) is copied, or, if it has `minimum` elements, split over the same axes where a dimension
    divides.
    """
    axes = place.axes(from_level=1)
    owners = {
        leaf_path(key_path): (leaf.shape, sharding)
        for (key_path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(abstract),
            jax.tree.leaves(_shardings(abstract, names, place, axes)),
        )
    }

    def sharding(key_path: Any, leaf: Any) -> NamedSharding:
        path = leaf_path(key_path)
        for suffix in _suffixes(path):
            shape, owned = owners.get(suffix, (None, None))
            if shape == leaf.shape:
                return owned
        spec = PartitionSpec()
        if math.prod(leaf.shape) >= place.minimum and not place.keeps_whole(path):
            spec = _spread(spec, leaf.shape, place.mesh, axes) or spec
        return NamedSharding(place.mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, state)


def bytes_per_device(abstract: Any, shardings: Any) -> int:
    """The bytes each device holds of a tree of arrays under a tree of shardings of the same structure."""
    sizes = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        abstract,
        shardings,
    )
    return sum(jax.tree.leaves(sizes))


def _shardings(abstract: Any, names: Any, place: Placement, axes: Sequence[str]) -> Any:
    def sharding(key_path: Any, leaf: Any, leaf_names: Names) -> NamedSharding:
        return NamedSharding(place.mesh, _leaf_spec(leaf_path(key_path), leaf.shape, leaf_names, place, axes))

    return jax.tree_util.tree_map_with_path(sharding, abstract, names)


def _leaf_spec(
    path: str, shape: tuple[int, ...], names: Names, place: Placement, axes: Sequence[str]
) -> PartitionSpec:
    if place.keeps_whole(path):
        return PartitionSpec()
    spec = place.rules.spec(names, shape, place.mesh, path)
    if math.prod(shape) < place.minimum:
        return spec
    wider = _spread(spec, shape, place.mesh, axes)
    if wider is None:
        split = " and ".join(f"{axis}={place.mesh.shape[axis]}" for axis in axes)
        raise InputError(
            f"{path}: no dimension of shape {shape} (already split as {tuple(spec)}) divides over {split}; "
            f"pad one, change the mesh, lower the ZeRO level, or list the array in `replicate`"
        )
    return wider


def _spread(
    spec: PartitionSpec, shape: Sequence[int], mesh: Mesh, axes: Sequence[str]
) -> PartitionSpec | None:
    """`spec` with every one of the axes put on a dimension that divides, or None where none does.

    One axis after the other, so that a sharding at a higher level only refines one at a lower level and
    gathering crosses the added axis alone. An axis goes to the dimension that an earlier one already
    splits; else to the largest that is whole; else to one that the rules split, such as the bias of a
    projection split over `tensor`.
    """
    entries = [_as_tuple(entry) for entry in spec] + [()] * (len(shape) - len(spec))
    placed: set[int] = set()
    for axis in axes:
        if any(axis in entry for entry in entries):  # the rules themselves put it there
            continue
        parts = [size // ways(mesh, entry) for size, entry in zip(shape, entries)]
        fitting = [i for i, part in enumerate(parts) if part and part % mesh.shape[axis] == 0]
        if not fitting:
            return None
        best = max(fitting, key=lambda i: (i in placed, not entries[i], parts[i], -i))
        entries[best] = (*entries[best], axis)
        placed.add(best)
    return make_spec(entries)


def _as_tuple(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _suffixes(path: str) -> list[str]:
    """`a/b/c`, `b/c`, `c` and, for a state whose parameter is one bare array, the empty path."""
    parts = path.split("/")
    return ["/".join(parts[start:]) for start in range(len(parts) + 1)]
