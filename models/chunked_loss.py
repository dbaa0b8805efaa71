"""Cross entropy that never holds the logits `[B, T, V]`, and on a mesh never gathers those of a token.

The loss is the last thing computed, so its gradients are made with it: the logits of a chunk of tokens are
there once, for the value and for the gradients, and nothing is computed again (as in Hsu et al. 2024, "Liger
Kernel", arXiv:2410.10989, §3.2). Where the mesh splits the words, a device makes the logits of its own
words; a token then costs a few numbers of communication for the loss and its `[D]` for the gradient
(Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053, §3).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Mesh, PartitionSpec

from ..parallel.rules import make_spec
from .losses import target_logit
from .precision import promote_statistics, statistics_dtype
from .word_scores import words_only

TILE = 128  # tokens: TPUs lay rows in tiles, and chunks that begin inside of one are moved row by row
LIFT = 2.0**12  # of float16 slopes, which are at most 2: of what they lose below 6e-8 nothing is left to see


@dataclass(frozen=True)
class ChunkedLoss:
    """What is known of the loss when it is traced; `words` is V with its padding, `vocab` V without it."""

    chunk: int
    smoothing: float
    vocab: int
    words: int
    across: bool
    scale: float
    output: str
    stored: str
    mesh: Mesh | None
    row_axes: tuple[str, ...]
    length_axes: tuple[str, ...]
    word_axes: tuple[str, ...]


class Kept(NamedTuple):
    """What the backward pass needs: gradients of the total, and of each token its loss and whether it hit.

    Gradients of what all tokens share have a leading axis, a row for each part of the tokens: they are summed
    over the mesh at the very end, where the compiler sees how the sum is to lie.
    """

    hidden: Array | None
    weights: Array | None
    bias: Array | None
    losses: Array
    hits: Array


class Slope(NamedTuple):
    """Gradients of one chunk: d total / d x `[c, D]`, and of weights and bias."""

    hidden: Array | None
    weights: Array | None
    bias: Array | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked_loss(
    loss: ChunkedLoss, hidden: Array, weights: Array, bias: Array | None, targets: Array, shares: Array
) -> tuple[Array, Array]:
    """Summed loss and summed weight of hits, for the fields of `WordScores` and `targets, shares [B, T]`.

    `shares` are the weights of the tokens. Differentiable once, in all but `targets`.
    """
    return _on_mesh(loss, (False, False, False), hidden, weights, bias, targets, shares)[0]


def _forward(loss: ChunkedLoss, *given: Any) -> tuple[tuple[Array, Array], Kept]:
    wanted = tuple(part is not None and part.perturbed for part in given[:3])
    return _on_mesh(loss, wanted, *(None if part is None else part.value for part in given))


def _backward(loss: ChunkedLoss, kept: Kept, cotangents: tuple[Any, Any]) -> tuple[Any, ...]:
    total, correct = (0.0 if isinstance(each, SymbolicZero) else each for each in cotangents)

    def summed(parts: Array | None) -> Array | None:
        return None if parts is None else (parts * total).sum(0).astype(loss.stored)

    hidden = None if kept.hidden is None else (kept.hidden * total).astype(kept.hidden.dtype)
    shares = kept.losses * total + kept.hits * correct
    return hidden, summed(kept.weights), summed(kept.bias), None, shares


chunked_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _on_mesh(loss: ChunkedLoss, wanted: tuple[bool, ...], *given: Any) -> tuple[tuple[Array, Array], Kept]:
    """Every device its own tokens and words; `wanted`: whether the gradients of hidden, weights, bias are."""
    compute = partial(_on_device, loss, wanted)
    if loss.mesh is None or loss.mesh.size == 1:
        return compute(*given)
    tokens = make_spec([loss.row_axes, loss.length_axes])
    names: list[tuple[str, ...]] = [(), loss.word_axes] if loss.across else [loss.word_axes, ()]
    parts = loss.row_axes + loss.length_axes
    nowhere, words = PartitionSpec(), make_spec([loss.word_axes])
    kept: list[Any] = [tokens, make_spec([parts, *names]), make_spec([parts, loss.word_axes])]
    kept = [*(spec if wants else None for spec, wants in zip(kept, wanted)), tokens, tokens]
    return jax.shard_map(
        compute,
        mesh=loss.mesh,
        in_specs=(tokens, make_spec(names), words, tokens, tokens),
        out_specs=((nowhere, nowhere), Kept(*kept)),
        check_vma=False,
    )(*given)


def _on_device(
    loss: ChunkedLoss,
    wanted: tuple[bool, ...],
    hidden: Array,
    weights: Array,
    bias: Array | None,
    targets: Array,
    shares: Array,
) -> tuple[tuple[Array, Array], Kept]:
    """Sums over the whole mesh and what this device keeps, one chunk after the other."""
    table, unit = weights.astype(hidden.dtype), _unit(hidden.dtype, shares)

    def chunk(sums: Slope, part: tuple[Array, ...]) -> tuple[Slope, tuple[Array, Array, Array | None]]:
        losses, hits, slope = _chunk(loss, wanted, table, bias, unit, *part)
        added = jax.tree.map(jnp.add, sums, slope._replace(hidden=None))
        return added, (losses, hits, slope.hidden)

    wide = statistics_dtype(hidden.dtype)
    zeros = Slope(
        None,
        jnp.zeros(weights.shape, wide) if wanted[1] else None,
        jnp.zeros(bias.shape, wide) if bias is not None and wanted[2] else None,
    )
    sums, rows = lax.scan(
        chunk, zeros, jax.tree.map(lambda x: _cut(x, loss.chunk), (hidden, targets, shares))
    )
    losses, hits, slopes = jax.tree.map(lambda x: _joined(x, targets.shape), rows)
    if slopes is not None:
        slopes = lax.psum(slopes, loss.word_axes)
    everywhere = loss.row_axes + loss.length_axes
    total, correct = lax.psum(((losses * shares).sum(), (hits * shares).sum()), everywhere)
    one = jax.tree.map(lambda x: x[None], sums)
    return (total, correct.astype(jnp.float32)), Kept(slopes, one.weights, one.bias, losses, hits)


def _chunk(
    loss: ChunkedLoss,
    wanted: tuple[bool, ...],
    table: Array,
    bias: Array | None,
    unit: Array | float,
    x: Array,
    targets: Array,
    shares: Array,
) -> tuple[Array, Array, Slope]:
    """Losses and hits of the tokens `x [c, D]`, and the gradients of their weighted sum."""
    column = 0 if loss.across else 1
    dimensions = ((1,), (column,)), ((), ())
    logits = lax.dot_general(x, table, dimensions, preferred_element_type=jnp.dtype(loss.output))
    logits = logits * loss.scale if loss.scale != 1.0 else logits
    logits = logits if bias is None else logits + bias.astype(logits.dtype)
    count = logits.shape[-1]
    first = lax.axis_index(loss.word_axes) * count if loss.word_axes else 0
    logits = words_only(logits, loss.vocab, first) if loss.words > loss.vocab else logits
    losses, hits, slope = _losses(loss, promote_statistics(logits), targets, first)
    slope = slope * (shares / unit)[:, None]
    slope = slope.astype(x.dtype)
    wide, back = statistics_dtype(x.dtype), unit * loss.scale
    into = partial(lax.dot_general, preferred_element_type=wide)
    pair = (x, slope) if loss.across else (slope, x)
    return (
        losses,
        hits,
        Slope(
            (into(slope, table, (((1,), (1 - column,)), ((), ()))) * back).astype(x.dtype)
            if wanted[0]
            else None,
            into(*pair, (((0,), (0,)), ((), ()))) * back if wanted[1] else None,
            slope.sum(0, dtype=wide) * unit if wanted[2] else None,
        ),
    )


def _losses(
    loss: ChunkedLoss, logits: Array, targets: Array, first: Array | int
) -> tuple[Array, Array, Array]:
    """Losses and hits `[c]`, and d loss / d logits `[c, V]`, of the logits of words from `first` on."""
    words = first + jnp.arange(logits.shape[-1])
    highest = lax.pmax(logits.max(-1, keepdims=True), loss.word_axes)
    powers = jnp.exp(logits - highest)
    sums = powers.sum(-1, keepdims=True), target_logit(logits, targets, first)
    total, chosen = lax.psum(sums, loss.word_axes)
    better = (logits < chosen) | ((logits == chosen) & (words >= targets[:, None]))
    misses = lax.psum((~better).sum(-1), loss.word_axes)
    normaliser = highest + jnp.log(total)
    losses, slope = normaliser - chosen, powers / total
    hit = (words == targets[:, None]).astype(slope.dtype)
    if loss.smoothing:
        real = words < loss.vocab
        mean = lax.psum(jnp.where(real, logits, 0).sum(-1, keepdims=True), loss.word_axes) / loss.vocab
        losses = (1 - loss.smoothing) * losses + loss.smoothing * (normaliser - mean)
        hit = (1 - loss.smoothing) * hit + loss.smoothing / loss.vocab * real
    return losses[:, 0], (misses == 0).astype(losses.dtype), slope - hit


def _unit(dtype: jnp.dtype, shares: Array) -> Array | float:
    """What slopes are divided by before they are rounded to `dtype`: float16 has no numbers below 6e-8."""
    return jnp.maximum(jnp.abs(shares).max(), 1e-9) / LIFT if dtype == jnp.float16 else 1.0


def _cut(x: Array, chunk: int) -> Array:
    """`[b, t, ...] -> [n, c, ...]`: chunks of at most `chunk` tokens, all of one size, zeros at the end."""
    tokens = x.shape[0] * x.shape[1]
    unit = TILE if chunk >= TILE else 1
    parts = -(-tokens // (chunk // unit * unit))
    each = -(-tokens // (parts * unit)) * unit
    flat = x.reshape(tokens, *x.shape[2:])
    padded = jnp.pad(flat, [(0, parts * each - tokens)] + [(0, 0)] * (flat.ndim - 1))
    return padded.reshape(parts, each, *flat.shape[1:])


def _joined(x: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `_cut`, for `shape` `[b, t]`."""
    tokens = shape[0] * shape[1]
    return x.reshape(-1, *x.shape[2:])[:tokens].reshape(*shape, *x.shape[2:])
