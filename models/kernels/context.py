"""Attention of sequences that lie over the devices of a mesh axis, from attention on one device and a merge.

Two ways: keys and values go round a ring, so that no device ever holds more than its share and its
neighbour's (`parallel.ring`); or every device gathers them all, which for few key heads is little and one
collective (as in Llama 3, Grattafiori et al. 2024, §3.3.2). Both call any implementation of `registry` on
pieces that are attentions by themselves: `Terms.cut` moves masks, biases and dropout to their places.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import Array, lax

from ... import InputError
from ...parallel.ring import ring_fold
from ...parallel.zigzag import Order
from .biases import Bias
from .dropout import Dropout
from .front import terms_of
from .letters import map_arrays
from .masks import Mask
from .merging import merge, merge_sinks
from .registry import choose
from .request import request_of
from .spans import Span, accumulation_dtype
from .terms import Terms
from .varying import vary, varying_axes

Method = Literal["ring", "gather"]
Rows = Literal["whole", "own"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a sequence lies over the devices of `axis`, and what computes a piece of its attention.

    `rows` says whether masks and biases are there for all queries or for the device's own.
    """

    axis: str
    order: Order
    impl: str
    rows: Rows

    def places(self, device: int | Array, length: int) -> list[Place]:
        """The runs of successive positions that a device holds."""
        if self.order == "contiguous":
            return [Place(Span(0, length), Span(device * length, length))]
        half, last = length // 2, 2 * lax.axis_size(self.axis) - 1
        first = Place(Span(0, half), Span(device * half, half))
        return [first, Place(Span(half, half), Span((last - device) * half, half))]


class Place(NamedTuple):
    """A run of positions: where it lies in the device's array, and in the sequence."""

    here: Span
    everywhere: Span

    def rows(self, held: Rows) -> Span:
        """The positions, to cut masks and biases by: of all queries, or of this device's alone."""
        return self.everywhere if held == "whole" else self.everywhere._replace(held=self.here.start)


@overload
def context_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    axis: str,
    mask: Mask,
    bias: Bias | Array | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    dropout: Dropout | None = None,
    method: Method = "ring",
    order: Order = "zigzag",
    rows: Rows = "whole",
    impl: str = "auto",
    return_lse: Literal[False] = False,
) -> Array: ...


@overload
def context_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    axis: str,
    mask: Mask,
    bias: Bias | Array | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    dropout: Dropout | None = None,
    method: Method = "ring",
    order: Order = "zigzag",
    rows: Rows = "whole",
    impl: str = "auto",
    return_lse: Literal[True],
) -> tuple[Array, Array]: ...


def context_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    axis: str,
    mask: Mask,
    bias: Bias | Array | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    dropout: Dropout | None = None,
    method: Method = "ring",
    order: Order = "zigzag",
    rows: Rows = "whole",
    impl: str = "auto",
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """`attention` inside `shard_map`, of sequences that are sharded over the mesh axis `axis`.

    q is `[B, T / n, H, K]`, k and v `[B, S / n, G, K]`, the parts of this device in the given order (see
    `zigzag_order`); mask, bias and dropout speak of whole sequences in their natural order, and their arrays
    are whole along T and S on every device. With `rows="own"` arrays are in the order of q and k instead, and
    along T hold this device's queries alone: of a dense mask or bias a device needs no more. Output
    `[B, T / n, H, K]` and lse `[B, H, T / n]` are those of one device, and so are all gradients. Raises
    InputError as `attention` does, for unknown options, and in zigzag order for parts of odd length.
    """
    devices, (queries, keys) = lax.axis_size(axis), (q.shape[1], k.shape[1])
    whole = (queries * (devices if rows == "whole" else 1), keys * devices)
    terms = terms_of(q, k, v, mask, bias, scale, soft_cap, sinks, dropout, whole)
    _check(q, k, method, order, rows)
    layout = Layout(axis, order, impl, rows)
    terms = terms if rows == "whole" else _keys_in_order(layout, terms)
    given = (q, k, v, terms)
    q, k, v, terms = vary(given, varying_axes(given) | {axis})
    attend = _ring_attention if method == "ring" else _gathered_attention
    out, lse = attend(layout, q, k, v, terms)
    return (out.astype(q.dtype), lse) if return_lse else out.astype(q.dtype)


def _check(q: Array, k: Array, method: str, order: str, rows: str) -> None:
    for name, value, valid in (
        ("method", method, ("ring", "gather")),
        ("order", order, ("zigzag", "contiguous")),
        ("rows", rows, ("whole", "own")),
    ):
        if value not in valid:
            raise InputError(f"context_attention: {name} is {value!r}; valid are {', '.join(valid)}")
    for name, array in (("q", q), ("k", k)):
        if order == "zigzag" and array.shape[1] % 2:
            raise InputError(
                f"context_attention: {name} has {array.shape[1]} positions on each device; zigzag order, "
                "of two chunks a device, needs an even number"
            )


def _gathered_attention(layout: Layout, q: Array, k: Array, v: Array, terms: Terms) -> tuple[Array, Array]:
    """Own queries on all keys."""
    k, v = (_in_order(layout, lax.all_gather(x, layout.axis, axis=1, tiled=True), 1) for x in (k, v))
    keys = Place(Span(0, k.shape[1]), Span(0, k.shape[1]))
    places = layout.places(lax.axis_index(layout.axis), q.shape[1])
    return _pieces(layout, q, k, v, terms, places, [keys])


def _in_order(layout: Layout, gathered: Array, axis: int) -> Array:
    """What devices hold one after the other along `axis`, in the order of the sequence."""
    if layout.order == "contiguous":
        return gathered
    shape, devices = gathered.shape, lax.axis_size(layout.axis)
    chunks = jnp.reshape(
        gathered, (*shape[:axis], devices, 2, shape[axis] // devices // 2, *shape[axis + 1 :])
    )
    early, late = (lax.index_in_dim(chunks, half, axis + 1, keepdims=False) for half in (0, 1))
    return jnp.concatenate([early, jnp.flip(late, axis)], axis).reshape(shape)


def _keys_in_order(layout: Layout, terms: Terms) -> Terms:
    """The arrays of masks and biases with their keys in the order of the sequence."""

    def in_order(letters: str, array: Any) -> Any:
        axis = letters.find("S")
        return array if axis < 0 or array.shape[axis] == 1 else _in_order(layout, jnp.asarray(array), axis)

    return map_arrays(in_order, terms)


def _ring_attention(layout: Layout, q: Array, k: Array, v: Array, terms: Terms) -> tuple[Array, Array]:
    """Own queries on the keys of one device after the other; the sinks join once, at the end."""
    out, lse = _ring(layout, q, k, v, dataclasses.replace(terms, sinks=None))
    return (out, lse) if terms.sinks is None else merge_sinks(out, lse, terms.sinks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(layout: Layout, q: Array, k: Array, v: Array, terms: Terms) -> tuple[Array, Array]:
    return _ring_forward(layout, q, k, v, terms)[0]


def _ring_forward(
    layout: Layout, q: Array, k: Array, v: Array, terms: Terms
) -> tuple[tuple[Array, Array], Any]:
    dtype, (batch, queries, heads, _) = accumulation_dtype(q.dtype), q.shape
    mine = layout.places(lax.axis_index(layout.axis), queries)

    def step(part: tuple[Array, Array], origin: Array) -> tuple[tuple[Array, Array], None]:
        return _pieces(layout, q, *part, terms, mine, layout.places(origin, k.shape[1])), None

    nothing = (
        jnp.zeros((batch, queries, heads, v.shape[3]), dtype),
        jnp.full((batch, heads, queries), -jnp.inf, dtype),
    )
    start = vary(nothing, varying_axes(q))
    outputs, _ = ring_fold(step, lambda a, b: merge(*a, *b), start, (k, v), layout.axis)
    return outputs, (q, k, v, terms, *outputs)


def _ring_backward(layout: Layout, residuals: Any, cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    """Each piece again, its gradients weighted by its share of the whole; those of keys travel with them.

    With o = sum_c w_c o_c and w_c = exp(lse_c - lse), the cotangent of o_c is w_c do and that of lse_c is
    w_c (do . (o_c - o) + dlse): what `merge` would have given, without keeping the keys of all devices.
    """
    q, k, v, terms, out, lse = residuals
    d_out, d_lse = cotangents
    mine = layout.places(lax.axis_index(layout.axis), q.shape[1])
    leaves, rebuild = _floating_leaves(terms)
    empty = lse == -jnp.inf
    norm, rest = jnp.where(empty, jnp.inf, lse), jnp.where(empty, 0, d_lse - _row_sums(d_out * out))

    def step(part: tuple[Array, Array], origin: Array) -> tuple[Any, Any]:
        def piece(q: Array, k: Array, v: Array, leaves: list[Array]) -> tuple[Array, Array]:
            return _pieces(layout, q, k, v, rebuild(leaves), mine, layout.places(origin, k.shape[1]))

        (part_out, part_lse), pull = jax.vjp(piece, q, *part, leaves)
        weight = jnp.exp(part_lse - norm)
        d_part = weight.swapaxes(1, 2)[..., None] * d_out
        dq, dk, dv, d_leaves = pull((d_part, weight * (_row_sums(d_out * part_out) + rest)))
        return _wide((dq, d_leaves)), _wide((dk, dv))

    zeros = vary(jax.tree.map(jnp.zeros_like, _wide((q, leaves, k, v))), varying_axes(q))
    add = functools.partial(jax.tree.map, jnp.add)
    (dq, d_leaves), (dk, dv) = ring_fold(step, add, zeros[:2], (k, v), layout.axis, zeros[2:])
    d_leaves = [d.astype(leaf.dtype) for d, leaf in zip(d_leaves, leaves)]
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), rebuild(d_leaves, others=False)


_ring.defvjp(_ring_forward, _ring_backward)


def _pieces(
    layout: Layout, q: Array, k: Array, v: Array, terms: Terms, queries: list[Place], keys: list[Place]
) -> tuple[Array, Array]:
    """Attention of runs of queries on runs of keys, each pair an attention by itself; at least float32."""
    rows = []
    for row in queries:
        parts = []
        for column in keys:
            inputs = row.here.cut(q, 1), column.here.cut(k, 1), column.here.cut(v, 1)
            cut = terms.cut(row.rows(layout.rows), column.everywhere)
            out, lse = choose(request_of(*inputs, cut, lse=True), layout.impl)(*inputs, cut)
            parts.append((out.astype(lse.dtype), lse))
        rows.append(functools.reduce(lambda a, b: merge(*a, *b), parts))
    return jnp.concatenate([out for out, _ in rows], 1), jnp.concatenate([lse for _, lse in rows], 2)


def _floating_leaves(terms: Terms) -> tuple[list[Array], Callable[..., Terms]]:
    """What of the terms has a gradient, and the terms again from such leaves (without the others: None)."""
    leaves, structure = jax.tree.flatten(terms)
    chosen = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def rebuild(given: list[Array], others: bool = True) -> Terms:
        remaining = iter(given)
        kept = leaves if others else [None] * len(leaves)
        return jax.tree.unflatten(
            structure, [next(remaining) if choice else leaf for choice, leaf in zip(chosen, kept)]
        )

    return [leaf for leaf, choice in zip(leaves, chosen) if choice], rebuild


def _row_sums(product: Array) -> Array:
    """`[B, T, H, K]` to `[B, H, T]`."""
    return product.sum(-1).swapaxes(1, 2)


def _wide(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(accumulation_dtype(x.dtype)), tree)
