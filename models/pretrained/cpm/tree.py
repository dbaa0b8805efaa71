"""A task in JSON as a tree of texts: its segments, and how each two of them are related.

Every key and every string is a segment. Below the root are the keys at depth 1 and their values at depth 2,
and so on. What stands under the key `<ans>` is to be predicted (OpenBMB/CPM-Bee, `dataset/utils.py`,
`convert_data_to_id`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .... import InputError

ROOT, ANSWER = "<root>", "<ans>"
STEPS = 8  # relations tell 0 to 7 steps apart on each side
Json = Mapping[str, Any]


@dataclass(frozen=True)
class Node:
    """One segment: its text, its number, the segments above it from the root on, and whether it is predicted.

    `path` are the keys that lead to a string.
    """

    text: str
    number: int
    above: tuple[int, ...] = ()
    predicted: bool = False
    path: tuple[str, ...] = ()


@dataclass
class _Tree:
    rng: np.random.Generator | None
    nodes: list[Node] = field(default_factory=list)

    def add(self, text: str, above: tuple[int, ...], predicted: bool, path: tuple[str, ...]) -> Node:
        node = Node(text, len(self.nodes), above, predicted, path)
        self.nodes.append(node)
        return node

    def grow(self, value: Any, above: tuple[int, ...], predicted: bool, path: tuple[str, ...]) -> None:
        if isinstance(value, str):
            self.add(value, above, predicted, path)
            return
        if not isinstance(value, Mapping):
            place = "/".join(path) or "the whole"
            raise InputError(f"{place} is a {type(value).__name__}; strings, and objects of these, are valid")
        items = list(value.items())
        if predicted and self.rng is not None:
            items = [items[index] for index in self.rng.permutation(len(items))]
        for key, inner in items:
            node = self.add(key, above, False, ())
            answers = predicted or (not path and key == ANSWER)
            self.grow(inner, (*above, node.number), answers, (*path, key))


def nodes_of(data: Json, rng: np.random.Generator | None = None) -> list[Node]:
    """The segments of a task, the root first, keys before their values; `rng` shuffles the order of answers.

    Raises `InputError` for a value that is neither a string nor an object, naming its place.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"the task is a {type(data).__name__}; a JSON object is valid")
    tree = _Tree(rng)
    root = tree.add(ROOT, (), False, ())
    tree.grow(data, (root.number,), False, ())
    return tree.nodes


def relations_of(nodes: list[Node]) -> np.ndarray:
    """The relation of each segment to each, int32 `[N, N]`: 0 to itself, else 1 + 8 up + down.

    Up and down are the steps, at most 7, from either to the nearest segment above both. Relation 1 remains
    for segments of two tasks.
    """
    chains = [(*node.above, node.number) for node in nodes]
    table = np.zeros((len(nodes), len(nodes)), np.int32)
    for row, one in enumerate(chains):
        for column, two in enumerate(chains):
            shared = next((n for n, pair in enumerate(zip(one, two)) if pair[0] != pair[1]), None)
            shared = min(len(one), len(two)) if shared is None else shared
            up, down = (min(len(chain) - shared, STEPS - 1) for chain in (one, two))
            table[row, column] = up * STEPS + down + 1 if row != column else 0
    return table


def with_answers(data: Json, answers: Mapping[tuple[str, ...], str]) -> dict[str, Any]:
    """A copy of a task with the strings at some paths replaced."""

    def copy(value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, Mapping):
            return {key: copy(inner, (*path, key)) for key, inner in value.items()}
        return answers.get(path, value)

    return copy(data, ())
