"""Log-likelihoods of continuations, many at once: rows of like length together, one program per bucket."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ... import InputError
from ...models import Params, Transformer
from ...models.generation.buckets import PROMPT, bucket
from ...parallel import Layout
from ...parallel.batches import on_host
from .perplexity import token_nats


class Score(NamedTuple):
    """The log-likelihood of a continuation in nats, and whether each of its tokens is the most probable."""

    log_likelihood: float
    greedy: bool


def score_continuations(
    model: Transformer,
    params: Params,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    limit: int,
    rows: int = 8,
    layout: Layout | None = None,
) -> list[Score]:
    """A score for each (context, continuation) of token ids, in their order.

    Texts longer than `limit` + 1 tokens lose the beginning of their context. `rows` are read at once, the
    longest first; rows of a bucket of lengths are one program.

    Raises InputError for a model that is no decoder, a limit beyond its positions, an empty context or
    continuation, a continuation of more than `limit`, and ids that the model has not.
    """
    if model.config.kind != "decoder":
        raise InputError(f"the model is of kind {model.config.kind!r}; continuations are scored by a decoder")
    model.config.positions.require(limit)
    for context, continuation in pairs:
        _check(context, continuation, limit, model.config.vocab)
    # The model is called as it is, and would take columns in another order for neighbours.
    layout = layout and replace(layout, order="contiguous")
    rows = rows if layout is None else layout.fitting_rows(rows)
    scores: dict[int, Score] = {}
    for chosen, width in _batches([len(a) + len(b) - 1 for a, b in pairs], limit, rows):
        batch = _batch([pairs[index] for index in chosen], limit, width, rows)
        placed = batch if layout is None else layout.place(batch)
        nats, greedy = on_host(_score(model, params, *placed))
        scores |= {i: Score(-float(n), bool(g)) for i, n, g in zip(chosen, nats, greedy)}
    return [scores[index] for index in range(len(pairs))]


def _check(context: Sequence[int], continuation: Sequence[int], limit: int, vocab: int) -> None:
    if not len(context) or not len(continuation):
        raise InputError("a context or continuation has no tokens; each needs at least one")
    if len(continuation) > limit:
        raise InputError(f"a continuation has {len(continuation)} tokens; at most {limit} are valid")
    ids = np.concatenate([context, continuation])
    if ids.min() < 0 or ids.max() >= vocab:
        raise InputError(f"tokens lie in {ids.min()} to {ids.max()}; the model has {vocab} ids")


def _batches(lengths: Sequence[int], limit: int, rows: int) -> Iterator[tuple[list[int], int]]:
    """Indices of texts in one bucket, `rows` at most, and its width; longest first."""
    buckets: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        width = min(bucket(min(lengths[index], limit), PROMPT), limit)
        buckets.setdefault(width, []).append(index)
    for width, members in buckets.items():
        for start in range(0, len(members), rows):
            yield members[start : start + rows], width


def _batch(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], limit: int, width: int, rows: int
) -> tuple[np.ndarray, ...]:
    """Inputs, segments, targets and weights of targets, all `[rows, width]`, padded on the right."""
    tokens, segments, targets, weights = np.zeros((4, rows, width), np.int32)
    for row, (context, continuation) in enumerate(pairs):
        text = [*context, *continuation][-(limit + 1) :]
        size = len(text) - 1
        tokens[row, :size], targets[row, :size], segments[row, :size] = text[:-1], text[1:], 1
        weights[row, size - len(continuation) : size] = 1
    return tokens, segments, targets, weights


@partial(jax.jit, static_argnames=("model",))
def _score(
    model: Transformer,
    params: Params,
    tokens: jax.Array,
    segments: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Nats `[rows]` of the weighted targets, and whether all of these are the most probable."""
    logits = model.apply(params, tokens, segments=segments)[..., : model.config.vocab]
    nats = (token_nats(logits, targets) * weights).sum(1)
    return nats, ((jnp.argmax(logits, -1) == targets) | (weights == 0)).all(1)
