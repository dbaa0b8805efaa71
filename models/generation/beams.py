"""Beam search: the continuations that a model finds most probable as a whole.

Its rules are those of Hugging Face transformers' `generate(num_beams=n)`, so that results agree: hypotheses
are compared by `log-probability / length^length_penalty`, where the length counts new tokens only, and
each step considers `max(2, 1 + stop tokens) * n` candidates so that n go on if some of them end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from ... import InputError
from ...parallel import Layout
from ...parallel.batches import on_host
from ..cache import Cache
from ..model import Params
from ..transformer import Transformer
from .padding import Tokens
from .prompts import Prompt, prepare, unrolled
from .sampling import Sampling, forbid, penalise_repetition
from .steps import Memory, held, read_prompt, read_token, seen_in
from .stopping import BROKEN_LOGITS, NOTHING, RUNNING, Stops, StopTokens, make_stops, stop_ids, stop_strings

RULED_OUT = -1e9
"""The score of what must not be chosen, as in transformers: finite, so that it can be added."""

EARLY = (True, False, "never")


@dataclass(frozen=True)
class Beams:
    """Hypotheses int32 `[B, R, N]`, best first, their `lengths` and `scores`, both `[B, R]`.

    A score is the sum of log-probabilities of the hypothesis's tokens, divided by `length^length_penalty`.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    scores: np.ndarray


@struct.dataclass
class Hypotheses:
    """Some for each prompt: `tokens [B, n, l + N]` after `l` columns of NOTHING, `lengths` and `scores`."""

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array

    def take(self, indices: jax.Array) -> Hypotheses:
        """Those at `indices [B, m]` of each prompt."""
        return Hypotheses(
            jnp.take_along_axis(self.tokens, indices[..., None], 1),
            jnp.take_along_axis(self.lengths, indices, 1),
            jnp.take_along_axis(self.scores, indices, 1),
        )

    def beside(self, other: Hypotheses) -> Hypotheses:
        """These and then those of `other`."""
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), self, other)


@struct.dataclass
class Search:
    """Beam search after `count` new tokens.

    `running` go on, of `ended` those with `complete [B, n]` are real; `hopeful [B, 1]` is whether a running
    one may still do better, `over` whether no candidate can go on; `seen [B n, V]` for the penalty.
    """

    memory: Memory
    running: Hypotheses
    ended: Hypotheses
    complete: jax.Array
    hopeful: jax.Array
    over: jax.Array
    count: jax.Array
    seen: jax.Array | None


@struct.dataclass
class Rules:
    """The numbers of a search, traced: none of them is part of the compiled program."""

    stops: Stops
    limit: Any
    length_penalty: Any
    repetition_penalty: Any


def beam_search(
    model: Transformer,
    params: Params,
    tokens: Tokens,
    *,
    max_new_tokens: int,
    beams: int,
    returned: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    segments: Any = None,
    decoder_tokens: Tokens | int | None = None,
    inputs: Mapping[str, Any] | None = None,
    stop_tokens: StopTokens = (),
    stop_sequences: Sequence[Sequence[int]] = (),
    min_new_tokens: int = 0,
    repetition_penalty: float = 1.0,
    pad_token: int = 0,
    layout: Layout | None = None,
) -> Beams:
    """The `returned` best of `beams` hypotheses for each prompt; other arguments as in `generate`.

    `early_stopping` True ends a prompt's search with its `beams`-th complete hypothesis; False also where
    no running one would beat the worst complete one if it ended now; "never" where none could at the
    length that favours it most. Prompts, the whole search included, run in one dispatch.

    Raises InputError for prompts, options or lengths that the model cannot take, and for logits that are NaN.
    """
    model, params = unrolled(model, params)
    _check(beams, returned, early_stopping, stop_sequences)
    options: dict[str, Any] = {"segments": segments, "decoder_tokens": decoder_tokens, "inputs": inputs}
    prepared = prepare(model, tokens, max_new_tokens, layout=layout, **options)
    penalised = Sampling(temperature=0.0, repetition_penalty=repetition_penalty).numbers()
    rules = Rules(
        make_stops(stop_tokens, stop_sequences, min_new_tokens, max_new_tokens),
        np.int32(max_new_tokens),
        np.float32(length_penalty),
        penalised.get("repetition_penalty"),
    )
    ended = search(
        model,
        params,
        prepared.prompt,
        rules,
        capacity=prepared.capacity,
        beams=beams,
        candidates=min(max(2, 1 + len(stop_ids(stop_tokens))) * beams, beams * model.config.vocab),
        early_stopping=early_stopping,
        layout=layout,
    )
    return _outcome(ended, prepared.rows, returned, rules.stops.span, pad_token)


def _check(
    beams: int, returned: int, early_stopping: bool | str, sequences: Sequence[Sequence[int] | str]
) -> None:
    if beams < 1 or not 1 <= returned <= beams:
        raise InputError(f"beams={beams} and returned={returned}; valid is 1 <= returned <= beams")
    if early_stopping not in EARLY:
        raise InputError(f"early_stopping={early_stopping!r} is not one of True, False, 'never'")
    if stop_strings(sequences, str):
        raise InputError("stop_sequences has a string; beam search takes sequences of ids only")


def _outcome(ended: Hypotheses, rows: int, returned: int, span: int, pad_token: int) -> Beams:
    best = jax.tree.map(lambda x: x[:rows, :returned], on_host(ended))
    if np.isnan(best.scores).any():
        raise InputError(BROKEN_LOGITS)
    longest = best.lengths.max()
    tokens = best.tokens[:, :, span : span + longest]
    tokens = np.where(np.arange(longest) < best.lengths[..., None], tokens, pad_token)
    return Beams(tokens.astype(np.int32), best.lengths, best.scores)


@partial(jax.jit, static_argnames=("model", "capacity", "beams", "candidates", "early_stopping", "layout"))
def search(
    model: Transformer,
    params: Params,
    prompt: Prompt,
    rules: Rules,
    *,
    capacity: int,
    beams: int,
    candidates: int,
    early_stopping: bool | str,
    layout: Layout | None,
) -> Hypotheses:
    """Read the prompts once, then run the whole search: the `beams` best hypotheses of each, best first."""
    logits, memory = read_prompt(model, params, prompt, capacity, layout)
    (rows, width), vocab = prompt.tokens.shape, model.config.vocab
    repeated = jnp.repeat(jnp.arange(rows), beams)
    seen = None if rules.repetition_penalty is None else seen_in(prompt, vocab)[repeated]
    start = _start(
        rows,
        beams,
        rules.stops.span + capacity - width,
        _with_cache(memory, memory.cache.rows(repeated), repeated),
        seen,
    )

    def choose(state: Search, logits: jax.Array) -> Search:
        return _choose(state, logits, rules, candidates, early_stopping)

    def step(state: Search) -> Search:
        latest = lax.dynamic_index_in_dim(
            state.running.tokens, rules.stops.span + state.count - 1, 2, keepdims=False
        )
        logits, memory = read_token(model, params, latest.reshape(-1), state.memory)
        state = state.replace(memory=memory)  # type: ignore[attr-defined]
        return held(choose(state, logits), layout)

    def unfinished(state: Search) -> jax.Array:
        full = state.complete.all() & (early_stopping is True)
        return state.hopeful.any() & ~full & ~state.over

    return lax.while_loop(unfinished, step, held(choose(start, logits[repeated]), layout)).ended


def _start(rows: int, beams: int, columns: int, memory: Memory, seen: jax.Array | None) -> Search:
    """Every beam is the prompt; all but the first are ruled out, or all would choose the same tokens."""
    tokens = jnp.full((rows, beams, columns), NOTHING, jnp.int32)
    lengths, worst = jnp.zeros((rows, beams), jnp.int32), jnp.full((rows, beams), RULED_OUT, jnp.float32)
    return Search(
        memory,
        Hypotheses(tokens, lengths, worst.at[:, 0].set(0.0)),
        Hypotheses(tokens, lengths, worst),
        complete=jnp.zeros((rows, beams), bool),
        hopeful=jnp.ones((rows, 1), bool),
        over=jnp.asarray(False),
        count=jnp.int32(0),
        seen=seen,
    )


def _with_cache(memory: Memory, cache: Cache, indices: jax.Array) -> Memory:
    """The memory of the rows at `indices`, whose cache is this."""
    beside = jax.tree.map(lambda x: jnp.take(x, indices, axis=0), (memory.positions, memory.token_types))
    return Memory(cache, *beside)


def _choose(
    state: Search, logits: jax.Array, rules: Rules, candidates: int, early_stopping: bool | str
) -> Search:
    """Extend the running hypotheses by one token of `logits [B n, V]` and sort out which have ended."""
    rows, beams = state.complete.shape
    scores = (
        _log_probabilities(state, logits, rules).reshape(rows, beams, -1) + state.running.scores[..., None]
    )
    extended, parents = _extended(state, scores, rules, candidates)
    count = state.count + 1
    recent = lax.dynamic_slice_in_dim(extended.tokens, count, rules.stops.span, 2)
    stopped = (rules.stops.found(recent, count) != RUNNING) | (count >= rules.limit)

    running, chosen = _best(extended, extended.scores + stopped * RULED_OUT, beams)
    ended, complete = _collected(state, extended, stopped, rules, early_stopping)
    chosen_rows = (jnp.take_along_axis(parents, chosen, 1) + beams * jnp.arange(rows)[:, None]).reshape(-1)
    last = lax.dynamic_index_in_dim(running.tokens, rules.stops.span + state.count, 2, keepdims=False)
    seen = None if state.seen is None else state.seen[chosen_rows]
    if seen is not None:
        seen = seen.at[jnp.arange(rows * beams), last.reshape(-1)].set(True)
    return Search(
        _with_cache(state.memory, state.memory.cache.exchanged(chosen_rows), chosen_rows),
        running,
        ended,
        complete,
        state.hopeful & _can_improve(running, ended, complete, count, rules, early_stopping),
        stopped.all(),
        count,
        seen,
    )


def _log_probabilities(state: Search, logits: jax.Array, rules: Rules) -> jax.Array:
    scores = jax.nn.log_softmax(logits, -1)
    if state.seen is not None:
        scores = penalise_repetition(scores, state.seen, rules.repetition_penalty)
    return forbid(scores, rules.stops.tokens, state.count < rules.stops.min_new_tokens)


def _extended(
    state: Search, scores: jax.Array, rules: Rules, candidates: int
) -> tuple[Hypotheses, jax.Array]:
    """The best `candidates` continuations `[B, c]` by `scores [B, n, V]`, and which beam each extends."""
    vocab = scores.shape[-1]
    best, flat = lax.top_k(scores.reshape(len(scores), -1), candidates)
    parents, tokens = flat // vocab, (flat % vocab).astype(jnp.int32)
    extended = state.running.take(parents)
    written = lax.dynamic_update_index_in_dim(extended.tokens, tokens, rules.stops.span + state.count, 2)
    return Hypotheses(written, extended.lengths + 1, best), parents


def _best(hypotheses: Hypotheses, scores: jax.Array, beams: int) -> tuple[Hypotheses, jax.Array]:
    """The `beams` with the highest of these `scores [B, m]`, which they then have, and their indices."""
    _, chosen = lax.top_k(scores, beams)
    return hypotheses.replace(scores=scores).take(chosen), chosen  # type: ignore[attr-defined]


def _collected(
    state: Search, extended: Hypotheses, stopped: jax.Array, rules: Rules, early_stopping: bool | str
) -> tuple[Hypotheses, jax.Array]:
    """The best complete hypotheses, old and new; of the new only those among the `n` best candidates."""
    beams = state.complete.shape[1]
    eligible = stopped & (jnp.arange(stopped.shape[1]) < beams)
    full = state.complete.all(1, keepdims=True) & (early_stopping is True)
    scores = extended.scores / (state.count + 1).astype(jnp.float32) ** rules.length_penalty
    for excluded in (full, ~state.hopeful, ~eligible):
        scores = scores + excluded * RULED_OUT
    merged = state.ended.beside(extended.replace(scores=scores))  # type: ignore[attr-defined]
    ended, chosen = _best(merged, merged.scores, beams)
    complete = jnp.take_along_axis(jnp.concatenate([state.complete, eligible], 1), chosen, 1)
    return ended, complete


def _can_improve(
    running: Hypotheses,
    ended: Hypotheses,
    complete: jax.Array,
    count: jax.Array,
    rules: Rules,
    early_stopping: bool | str,
) -> jax.Array:
    """Whether the best running hypothesis could beat the worst complete one, bool `[B, 1]`."""
    longest = (early_stopping == "never") & (rules.length_penalty > 0)
    length = jnp.where(longest, rules.limit, count).astype(jnp.float32)
    possible = running.scores[:, :1] / length**rules.length_penalty
    worst = jnp.where(complete, ended.scores.min(1, keepdims=True), RULED_OUT)
    return (possible > worst).any(1, keepdims=True)
