"""Which axis of every array of an attention is batch, head, query or key: what sharding has to know.

The letters are the usual ones, B batch, H heads, T queries, S keys; any other letter is an axis of its own.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from ... import InputError
from .biases import ALiBi, Bias, Bucketed
from .biases import Dense as DenseBias
from .dropout import Dropout
from .flags import Keys, Queries
from .masks import And, Causal, Dense, Full, Lengths, Mask, Not, Or, Prefix, Segments, Window
from .relations import Relations
from .terms import Terms

Node = TypeVar("Node")
NODES = (Mask, Bias, Dropout)

# A scalar in the place of an array has no axes, whatever its row says.
LETTERS: Mapping[type, Mapping[str, str]] = {
    Terms: {"sinks": "H"},
    Dropout: dict.fromkeys(("seed", "batch", "head", "query", "key"), ""),
    And: {},
    Or: {},
    Not: {},
    Full: {},
    Causal: {"offset": "B"},
    Window: {"offset": "B"},
    Prefix: {"lengths": "B", "offset": "B"},
    Lengths: {"lengths": "B"},
    Segments: {"query": "BT", "key": "BS"},
    Keys: {"flags": "BS"},
    Queries: {"flags": "BT"},
    Dense: {"allowed": "BHTS"},
    DenseBias: {"values": "BHTS"},
    Bucketed: {"table": "RH", "offset": "B"},
    ALiBi: {"slopes": "H", "offset": "B"},
    Relations: {
        "table": "RH",
        "relations": "BTN",
        "segments": "BS",
        "query_positions": "BT",
        "key_positions": "BS",
        "query_groups": "BT",
        "key_groups": "BS",
    },
}


def map_arrays(change: Callable[[str, Any], Any], node: Node) -> Node:
    """The same expression with `change(letters, array)` in the place of every array.

    Raises InputError for a mask or bias of a class that has no row in `LETTERS`.
    """
    if type(node) not in LETTERS:
        raise InputError(
            f"{type(node).__name__}: nothing says which axes of its arrays are batch, heads and length, so "
            f"it cannot lie on a mesh; add a row to models/kernels/letters.py"
        )
    rows = LETTERS[type(node)]
    children, structure = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda child: child is not node and isinstance(child, NODES)
    )

    def changed(path: Any, child: Any) -> Any:
        if isinstance(child, NODES):
            return map_arrays(change, child)
        return change(rows[path[0].name] if jnp.ndim(child) else "", child)

    return jax.tree.unflatten(structure, [changed(path, child) for path, child in children])


def explicit(node: Node) -> Node:
    """The same expression with nothing standing for two sides at once: `Segments` have ids of their keys."""
    if isinstance(node, Segments):
        return Segments(node.query, node.keys())  # type: ignore[return-value]
    if type(node) not in LETTERS:
        return node
    children, structure = jax.tree.flatten(
        node, is_leaf=lambda child: child is not node and isinstance(child, NODES)
    )
    return jax.tree.unflatten(
        structure, [explicit(child) if isinstance(child, NODES) else child for child in children]
    )
