"""What is tuned, added and frozen: counts and bytes, and a table with repeated layers folded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax

from .addresses import Hit
from .attach import Tuned
from .folding import fold
from .methods import LeafMethod
from .trees import SHARED, places

Status = Literal["frozen", "tuned", "added"]


@dataclass(frozen=True)
class Row:
    """Arrays under one folded path: `tuned` ones of the backbone, `added` ones, and `frozen` ones."""

    path: str
    status: Status
    method: str
    parameters: int
    bytes: int


def parameter_count(tree: Any) -> int:
    """Numbers in a tree of arrays, or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def byte_count(tree: Any) -> int:
    """Bytes that a tree of arrays takes, each in its own dtype."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def summary(tuned: Tuned, params: Mapping[str, Any], variables: Mapping[str, Any]) -> list[Row]:
    """One row per folded path and status, the backbone's arrays in tree order and each delta after its place.

    A frozen row counts the backbone's numbers, tuned and added rows the delta's.
    """
    hits = tuned.hits(variables, params)
    trained = places(variables["delta"])
    deltas = {(path, entry): trained.get((path, entry.name), {}) for path, entry in hits}
    replaced: dict[str, list[Hit]] = {}
    for (path, entry), hit in hits.items():
        if isinstance(entry.method, LeafMethod):
            replaced.setdefault(path, []).append(hit)
    found: list[tuple[str, Status, str, Any]] = []
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    for keys, leaf in flat:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if not any(hit.rows is None for hit in replaced.get(path, ())):
            found.append((path, "frozen", "", leaf))
    for (path, name), shared in trained.items():
        if path == "" and set(shared) == {SHARED}:
            found.append((path, "tuned", name, shared))
    for (path, entry), delta in deltas.items():
        status: Status = "tuned" if isinstance(entry.method, LeafMethod) else "added"
        found.append((path, status, entry.name, delta))
    return _folded(found)


def _folded(found: list[tuple[str, Status, str, Any]]) -> list[Row]:
    groups: dict[tuple[Status, str], dict[str, Any]] = {}
    for path, status, method, tree in found:
        groups.setdefault((status, method), {})[path] = tree
    rows = []
    for (status, method), trees in groups.items():
        for name, members in fold(trees).items():
            part = [trees[path] for path in members]
            rows.append(Row(name, status, method, parameter_count(part), byte_count(part)))
    return rows
