"""Inside `shard_map`: arrays that differ from device to device, and constants that have to join them.

JAX tracks over which mesh axes a value varies and refuses loops and custom gradients that mix the two
kinds; outside `shard_map` nothing varies and these functions do nothing.
"""

from typing import Any, TypeVar

import jax

T = TypeVar("T")


def varying_axes(tree: Any) -> frozenset[str]:
    """The mesh axes over which any array of the tree varies."""
    return frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree)))


def vary(tree: T, axes: frozenset[str]) -> T:
    """The same values, varying over `axes` too; the gradient of what did not vary is summed over them."""

    def join(leaf: Any) -> Any:
        missing = tuple(sorted(axes - jax.typeof(leaf).manual_axis_type.varying))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(join, tree)
