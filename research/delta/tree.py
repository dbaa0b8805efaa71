"""A tuned model as a tree: every array with what a delta does to it, layers that are alike shown once.

print(tree(tuned, params, variables))

Arrays of the backbone are `frozen`, or `tuned` by a leaf method, whose numbers stand below them. What a delta
brings is `added`, or `fixed` where it is kept and not trained. `tree_drawing` has the same as HTML and SVG.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from .addresses import Hit
from .attach import Tuned
from .folding import NUMBERED, spans
from .methods import LeafMethod
from .trees import leaf_paths, node_at

STATUSES = ("frozen", "tuned", "added", "fixed")
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Node:
    """A module, an array, or several alike in one line: `copies` of them, of which `shape` is that of one."""

    name: str
    status: str = ""
    shape: tuple[int, ...] | None = None
    dtype: str = ""
    note: str = ""
    children: tuple[Node, ...] = ()
    copies: int = 1

    @cached_property
    def numbers(self) -> dict[str, int]:
        """How many numbers of each status stand here and below, in all copies."""
        own = 0 if self.shape is None else math.prod(self.shape)
        return self._sums(own, [child.numbers for child in self.children])

    @cached_property
    def bytes(self) -> dict[str, int]:
        """Their bytes, each in its own dtype."""
        own = 0 if self.shape is None else math.prod(self.shape) * jnp.dtype(self.dtype).itemsize
        return self._sums(own, [child.bytes for child in self.children])

    def _sums(self, own: int, below: list[dict[str, int]]) -> dict[str, int]:
        return {
            status: self.copies * (own * (status == self.status) + sum(each[status] for each in below))
            for status in STATUSES
        }

    @property
    def label(self) -> str:
        """What a line says of the status: of an array its own, of a module what its arrays have."""
        if self.shape is not None:
            return self.status
        found = [status for status in STATUSES if self.numbers[status]]
        return found[0] if len(found) == 1 else " + ".join(s for s in found if s != "frozen") or "empty"


@dataclass(frozen=True)
class Line:
    """A node where it stands: `branch` is what connects it to the lines above."""

    branch: str
    node: Node


@dataclass(frozen=True)
class ModelTree:
    """The whole tree; `str` is its text."""

    root: Node

    @property
    def backbone(self) -> int:
        """Numbers of the model itself."""
        return self.root.numbers["frozen"] + self.root.numbers["tuned"]

    @property
    def trained(self) -> int:
        """Numbers that training changes."""
        return self.root.numbers["added"]

    @property
    def percentage(self) -> float:
        """Trained numbers, in percent of the backbone's."""
        return 100 * self.trained / max(self.backbone, 1)

    def lines(self, brief: bool = False) -> Iterator[Line]:
        """The nodes below the root, from the top; if `brief`, nothing below a module that is all frozen."""
        yield from _lines(self.root, "", brief)

    def text(self, brief: bool = False) -> str:
        """The tree with a line of totals below it."""
        rows = [cells(line) for line in self.lines(brief)]
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join([*(_aligned(row, widths) for row in rows), self.totals()])

    def totals(self) -> str:
        """The sentence below the tree."""
        numbers, size = self.root.numbers, self.root.bytes
        backbone = size["frozen"] + size["tuned"]
        text = (
            f"backbone {self.backbone:,} numbers ({byte_text(backbone)}); trained {self.trained:,} "
            f"({byte_text(size['added'])}), {percent_text(self.percentage)} of the backbone"
        )
        fixed = f"; kept and not trained {numbers['fixed']:,} ({byte_text(size['fixed'])})"
        return text + (fixed if numbers["fixed"] else "")

    def __str__(self) -> str:
        return self.text()


def tree(tuned: Tuned, params: Mapping[str, Any], variables: Mapping[str, Any]) -> ModelTree:
    """The tree of the backbone `params` and of what `variables` put onto it; arrays or their shapes."""
    leaves: dict[tuple[str, ...], Node] = {}
    hits = tuned.hits(variables, params)
    replaced = {path for path, entry in hits if isinstance(entry.method, LeafMethod)}
    for path in leaf_paths(params):
        keys = tuple(path.split("/"))
        leaves[keys] = _array(keys[-1], node_at(params, path), "tuned" if path in replaced else "frozen")
    notes = {f"{path}/{entry.name}".strip("/"): _rows_text(hit) for (path, entry), hit in hits.items()}
    for part, status in (("delta", "added"), ("delta_state", "fixed")):
        for keys, leaf in flatten_dict(dict(variables.get(part, {}))).items():
            leaves[keys] = _array(keys[-1], leaf, status)
    return ModelTree(_built("", leaves, (), notes))


def byte_text(count: int) -> str:
    """Bytes with a unit: `86.6 MiB`."""
    value, unit = float(count), UNITS[0]
    for unit in UNITS:
        if value < 1024 or unit == UNITS[-1]:
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def percent_text(percentage: float) -> str:
    """Three digits that count, and never 0% of something."""
    return f"{percentage:.3g}%" if percentage else "0%"


def _built(
    name: str, leaves: Mapping[tuple[str, ...], Node], path: tuple[str, ...], notes: Mapping[str, str]
) -> Node:
    """The node of everything in `leaves`, whose keys start below it."""
    below: dict[str, dict[tuple[str, ...], Node]] = {}
    own = leaves.get(())
    for keys, leaf in leaves.items():
        if keys:
            below.setdefault(keys[0], {})[keys[1:]] = leaf
    children = _folded(tuple(_built(key, each, (*path, key), notes) for key, each in below.items()))
    note = notes.get("/".join(path), "")
    if own is None and name.startswith("~") and len(children) == 1:  # `~bitfit/offset` in one line
        return replace(children[0], name=f"{name}/{children[0].name}", note=note)
    return replace(own or Node(name), note=note, children=children)


def _folded(children: tuple[Node, ...]) -> tuple[Node, ...]:
    """Children that differ in their number alone as one node, where the first of them stands."""
    groups: dict[Node, list[str]] = {}
    for child in children:
        match = NUMBERED.search(child.name)
        key = NUMBERED.sub("{}", child.name, count=1) if match else child.name
        groups.setdefault(replace(child, name=key), []).append(match[0] if match else "")
    folded = []
    for node, found in groups.items():
        numbers = sorted(int(number) for number in found if number)
        text = str(numbers[0]) if len(numbers) == 1 else "{" + spans(numbers) + "}"
        name = node.name.replace("{}", text) if numbers else node.name
        folded.append(replace(node, name=name, copies=len(found)))
    return tuple(folded)


def _array(name: str, leaf: Any, status: str) -> Node:
    return Node(name, status, tuple(leaf.shape), str(leaf.dtype))


def _rows_text(hit: Hit) -> str:
    return "" if hit.rows is None else f"layers {spans(hit.rows)} of {hit.total}"


def cells(line: Line) -> tuple[str, str, str, str, str]:
    """What a line says: name, shape, count, bytes, status."""
    node = line.node
    name = node.name + (f" ×{node.copies}" if node.copies > 1 else "")
    shape = "" if node.shape is None else f"{node.dtype}{list(node.shape)}"
    label = node.label + (f", {node.note}" if node.note else "")
    count, size = sum(node.numbers.values()), sum(node.bytes.values())
    return line.branch + name, shape, f"{count:,}", byte_text(size), label


def _lines(node: Node, indent: str, brief: bool) -> Iterator[Line]:
    for index, child in enumerate(node.children):
        last = index == len(node.children) - 1
        yield Line(indent + ("└─ " if last else "├─ "), child)
        if not (brief and child.label == "frozen"):
            yield from _lines(child, indent + ("   " if last else "│  "), brief)


def _aligned(row: tuple[str, ...], widths: list[int]) -> str:
    """Cells as columns, counts and bytes to the right."""
    padded = [
        cell.rjust(width) if column in (2, 3) else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(row, widths))
    ]
    return "  ".join(padded).rstrip()
