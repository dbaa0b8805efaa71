"""Dropout inside the kernels: the same bits as everywhere, from hashes of queries and keys made before.

A hash a query and one a key are read like numbers of a row; what is left to a kernel is to mix them for each
pair. In the backward pass the sign of a weight says whether it was dropped, so that no tile of bits has to be
kept in registers. Nothing is divided by `1 - rate` there but what is read and written once (`Problem.kept`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..dropout import Dropout, kept
from .operations import Ref
from .problem import Problem
from .scores import along


class Hashes(NamedTuple):
    """Of queries `[B, H, T]` and of keys `[B, H, S]`, uint32; or references to them."""

    queries: Any
    keys: Any


def hashes(dropout: Dropout | None, problem: Problem) -> Hashes | None:
    """Those of all positions, padded ones too."""
    if dropout is None or not dropout.rate:
        return None
    batch = jnp.arange(problem.batch, dtype=jnp.int32)[:, None, None]
    head = jnp.arange(problem.heads, dtype=jnp.int32)[:, None]
    rows, columns = (jnp.arange(n, dtype=jnp.int32) for n in (problem.queries, problem.keys))
    return Hashes(*dropout.hashes(batch, head, rows, columns))


def buffers(dropped: bool, stages: int, size: int) -> tuple[Any, ...]:
    """Shared memory for the hashes of tiles in flight."""
    return (plgpu.SMEM((stages, size), jnp.uint32),) if dropped else ()


def sources(ref: Ref | None, place: tuple[Any, ...]) -> tuple[Ref, ...]:
    """What is copied to those buffers for one tile."""
    return () if ref is None else (ref.at[place],)


def keep(problem: Problem, rows: Array | None, columns: Array | None, shape: tuple[int, ...]) -> Array | None:
    """Whether each weight of a tile stays, from the hashes along its two axes; None without dropout."""
    if rows is None or columns is None:
        return None
    return kept(problem.rate, along(rows, shape, 0), along(columns, shape, 1))
