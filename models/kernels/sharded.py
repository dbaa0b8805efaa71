"""Attention on a mesh: every device computes its own rows and heads, of split sequences its own part.

XLA cannot split a kernel that is written by hand, and splits the loops of one that is not badly. So what is
to be computed where is said here: inside one `jax.shard_map` a device has an attention of its own, which
any implementation computes as if nothing else existed.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from ... import InputError
from ...parallel.manual import mesh_here
from ...parallel.zigzag import Order
from .biases import Bias
from .context import Method, context_attention
from .dropout import Dropout
from .front import attention, terms_of
from .letters import explicit, map_arrays
from .masks import Mask
from .terms import Terms

logger = logging.getLogger("modicum.kernels")


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """Over which axes of `mesh` the batch, the heads and the positions of an attention lie.

    `order` is how positions lie over `length` (see `zigzag_order`); `method` how keys reach queries there.
    """

    mesh: Mesh
    batch: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    length: str | None = None
    order: Order = "contiguous"
    method: Method = "ring"


class Heads(NamedTuple):
    """Over which mesh axes heads lie, and whether those of keys are "split", "sliced" or "repeated"."""

    axes: tuple[str, ...]
    keys: str


def sharded_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    axes: MeshAxes,
    mask: Mask,
    bias: Bias | Array | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    dropout: Dropout | None = None,
    impl: str = "auto",
    return_lse: bool = False,
) -> Any:
    """`attention` of the same arrays and options, computed where `axes` say: `[B, T, H, K]`, `[B, H, T]`.

    Arrays are global, as under `jax.jit`; inside a `shard_map` over some axes the remaining ones count, and
    over all it is `attention`. In zigzag order whatever has positions, in masks and biases too, is given in
    it; causal masks, windows and distances speak of the natural order. Each axis that does not divide what
    lies over it is left out, logged to `modicum.kernels`. Raises InputError as `attention` does, for lengths
    that do not divide, and for masks and biases of unknown axes.
    """
    options: dict[str, Any] = {"scale": scale, "soft_cap": soft_cap, "impl": impl, "return_lse": return_lse}
    terms = explicit(terms_of(q, k, v, mask, bias, scale, soft_cap, sinks, dropout))
    mesh, manual = mesh_here(axes.mesh)
    if axes.order == "zigzag" and axes.length in manual and mesh.shape[axes.length] > 1:
        raise InputError(
            f"attention: a shard_map around has split {axes.length} already, and then nothing says where a "
            f'device\'s positions are; call context_attention, or use order="contiguous" for whole sequences'
        )
    if manual == set(mesh.axis_names):
        return attention(q, k, v, mask=mask, bias=bias, sinks=sinks, dropout=dropout, **options)
    place = _fitting(axes, mesh, manual, q, k)
    heads = share_heads(q.shape[2], k.shape[2], place.heads, math.prod(mesh.shape[a] for a in place.heads))
    if heads.keys == "repeated":
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    along = {"B": place.batch, "H": heads.axes, "T": _tuple(place.length)}
    queries = _spec(along, "BTHK", q)
    keys = _spec(along, "BTHK" if heads.keys != "sliced" else "BTGK", k)
    given = map_arrays(lambda letters, array: _spec(along, letters, array), terms)
    logs = PartitionSpec(queries[0], queries[2], queries[1])

    def own(q: Array, k: Array, v: Array, terms: Terms) -> Any:
        if heads.keys == "sliced":
            k, v = (_own_head(x, heads.axes) for x in (k, v))
        return _computed(place, heads, q, k, v, terms, options)

    return jax.shard_map(
        own,
        mesh=mesh,
        in_specs=(queries, keys, keys, given),
        out_specs=(queries, logs) if return_lse else queries,
        axis_names=set(mesh.axis_names) - manual,
    )(q, k, v, terms)


def _computed(
    place: MeshAxes, heads: Heads, q: Array, k: Array, v: Array, terms: Terms, options: dict[str, Any]
) -> Any:
    """The attention of one device, of its own part of everything."""
    dropout = terms.dropout
    if dropout is not None:
        batch, head = (
            dropout.batch + _first(place.batch, q.shape[0]),
            dropout.head + _first(heads.axes, q.shape[2]),
        )
        dropout = dataclasses.replace(dropout, batch=batch, head=head)
    given = {"mask": terms.mask, "bias": terms.bias, "sinks": terms.sinks, "dropout": dropout, **options}
    if place.length is None:
        return attention(q, k, v, **given)
    return context_attention(
        q, k, v, axis=place.length, method=place.method, order=place.order, rows="own", **given
    )


@functools.lru_cache(maxsize=256)
def share_heads(heads: int, kv_heads: int, axes: tuple[str, ...], ways: int) -> Heads:
    """How `heads` query heads and `kv_heads` key heads lie over mesh axes of `ways` devices; logged.

    Both split where both divide. With fewer key heads than devices each device takes the one that its query
    heads read, and where even that is not one, every query head gets a copy of its own.
    """
    if heads % ways:
        logger.info(
            "attention: %d heads do not divide over %s=%d: whole everywhere", heads, "×".join(axes), ways
        )
        return Heads((), "split")
    if kv_heads % ways == 0:
        return Heads(axes, "split")
    how = "sliced" if ways % kv_heads == 0 else "repeated"
    logger.info("attention: %d key heads over %s=%d: %s on each device", kv_heads, "×".join(axes), ways, how)
    return Heads(axes, how)


@functools.lru_cache(maxsize=256)
def share_rows(rows: int, axes: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    """Over which mesh axes, of these names and sizes, batch rows lie: the first ones, as far as they divide.

    What is left out is logged, once for the same rows and axes however many layers ask.
    """
    free = [axis for axis in axes if axis[1] > 1]
    while free and rows % math.prod(size for _, size in free):
        told = "×".join(name for name, _ in free)
        logger.info("attention: %d rows do not divide over %s: not split over the last", rows, told)
        free.pop()
    return tuple(name for name, _ in free)


def _fitting(axes: MeshAxes, mesh: Mesh | AbstractMesh, manual: set[str], q: Array, k: Array) -> MeshAxes:
    """`axes` without those that are manual already, or split nothing, or do not divide the batch."""
    free = tuple((axis, mesh.shape[axis]) for axis in axes.batch if axis not in manual)
    batch = share_rows(q.shape[0], free)
    heads = tuple(axis for axis in axes.heads if axis not in manual and mesh.shape[axis] > 1)
    length = axes.length
    if length is None or length in manual or mesh.shape[length] == 1:
        return dataclasses.replace(axes, batch=batch, heads=heads, length=None)
    pieces = mesh.shape[length] * (2 if axes.order == "zigzag" else 1)
    for name, size in (("queries", q.shape[1]), ("keys", k.shape[1])):
        if size % pieces:
            raise InputError(
                f"attention: {size} {name} do not divide into {pieces} pieces ({axes.order} order over "
                f"{length}={mesh.shape[length]}); use a length that is a multiple of {pieces}"
            )
    return dataclasses.replace(axes, batch=batch, heads=heads)


def _spec(along: dict[str, tuple[str, ...]], letters: str, array: Any) -> PartitionSpec:
    """Where an array lies whose axes are these letters; an axis of size 1 broadcasts and is whole."""
    entries = [along.get(letter, ()) if size > 1 else () for letter, size in zip(letters, jnp.shape(array))]
    return PartitionSpec(*(entry or None for entry in entries))


def _own_head(x: Array, axes: tuple[str, ...]) -> Array:
    """Of keys `[B, S, G, K]` the one head `[B, S, 1, K]` that this device's query heads read."""
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axes) * x.shape[2] // lax.axis_size(axes), 1, axis=2)


def _first(axes: tuple[str, ...], size: int) -> Any:
    """The index of this device's first element along an axis that is split into parts of `size`."""
    return lax.axis_index(axes) * size if axes else 0


def _tuple(axis: str | None) -> tuple[str, ...]:
    return () if axis is None else (axis,)
