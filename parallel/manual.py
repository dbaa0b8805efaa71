"""Inside `shard_map`: which axes of the mesh are split already, and what a nested one may still split."""

from __future__ import annotations

import jax
from jax.sharding import AbstractMesh, Mesh


def mesh_here(mesh: Mesh) -> tuple[Mesh | AbstractMesh, set[str]]:
    """The mesh that a `shard_map` here in a traced program takes, and its axes that are manual already.

    That is `mesh` itself, unless an enclosing `shard_map` has split some of its axes.
    """
    around = jax.sharding.get_abstract_mesh()
    manual = set() if around.empty else set(around.manual_axes)
    return (around if manual else mesh), manual
