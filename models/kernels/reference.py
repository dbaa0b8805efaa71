"""Softmax attention as it is written on paper: the oracle of other kernels, and the source of patterns."""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from .biases import Bias
from .dropout import Dropout
from .masks import Mask
from .request import Request
from .spans import Span, accumulation_dtype
from .terms import Terms
from .trees import AnyArray


@dataclasses.dataclass(frozen=True)
class Reference:
    """The `[B, H, T, S]` matrix of scores in full; supports everything."""

    name: str = "reference"

    def supports(self, request: Request) -> str | None:
        """It can do every request."""
        return None

    def unfit(self, request: Request) -> str | None:
        """It is where every choice ends."""
        return None

    def __call__(self, q: Array, k: Array, v: Array, terms: Terms) -> tuple[Array, Array]:
        """Output `[B, T, H, K]` and log-sum-exp `[B, H, T]`."""
        probabilities, lse = softmax(attention_scores(q, k, terms), terms.sinks)
        if terms.dropout is not None:
            probabilities = dropped(probabilities, terms.dropout)
        grouped = group_heads(probabilities, k.shape[2]).astype(v.dtype)
        out = jnp.einsum("bgrts,bsgk->btgrk", grouped, v, preferred_element_type=lse.dtype)
        return out.reshape(*q.shape[:3], v.shape[3]).astype(q.dtype), lse


def attention_scores(q: Array, k: Array, terms: Terms) -> Array:
    """What the softmax is taken of, at least float32 `[B, H, T, S]`, -inf where masked.

    The order is scale, bias, soft cap, mask. Query head h reads key head `h // (H / G)`.
    """
    batch, queries, heads, width = q.shape
    keys, groups = k.shape[1:3]
    grouped = q.reshape(batch, queries, groups, heads // groups, width)
    dtype = accumulation_dtype(q.dtype)
    scores = jnp.einsum("btgrk,bsgk->bgrts", grouped, k, preferred_element_type=dtype)
    scores = scores.reshape(batch, heads, queries, keys) * terms.scale
    return masked_scores(scores, terms.mask, terms.bias, terms.soft_cap)


def masked_scores(scores: Array, mask: Mask, bias: Bias | None, soft_cap: float | None) -> Array:
    """Scaled scores `[B, H, T, S]` with bias and soft cap, -inf where masked."""
    rows, columns = Span(0, scores.shape[2]), Span(0, scores.shape[3])
    if bias is not None:
        scores = scores + bias.tile(rows, columns).astype(scores.dtype)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    return jnp.where(mask.predicate(rows, columns), scores, -jnp.inf)


def dropped(probabilities: Array, dropout: Dropout) -> Array:
    """Probabilities `[B, H, T, S]`, some zero and the others greater."""
    keep = dropout.keep(*(Span(0, size) for size in probabilities.shape))
    return jnp.where(keep, probabilities / (1 - dropout.rate), 0)


def group_heads(array: Array, groups: int) -> Array:
    """`[B, H, ...]` as `[B, G, H / G, ...]`; a head axis of size 1 broadcasts and becomes two."""
    heads = array.shape[1]
    return array.reshape(
        array.shape[0], *((1, 1) if heads == 1 else (groups, heads // groups)), *array.shape[2:]
    )


def softmax(scores: Array, sinks: AnyArray | None = None) -> tuple[Array, Array]:
    """Probabilities and log-sum-exp of scores `[B, H, T, S]`; `sinks [H]` join the sum.

    A row without any key gives 0, -inf (or its sink) and no gradient to the scores.
    """
    sink = None if sinks is None else sinks[:, None, None].astype(scores.dtype)
    top = lax.stop_gradient(scores.max(-1, keepdims=True))
    top = top if sink is None else jnp.maximum(top, lax.stop_gradient(sink))
    top = jnp.where(jnp.isfinite(top), top, 0)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    total = total if sink is None else total + jnp.exp(sink - top)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    return weights / total, lse[..., 0]
