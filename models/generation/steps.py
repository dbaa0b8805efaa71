"""The two jitted programs of generation: read the prompt, and write tokens until told to stop.

Both are compiled once per bucket of lengths, choice of processors and layout. `decode` runs any number of
steps in one `lax.while_loop`: streaming asks it for one, everything else for many. On CPUs a step takes
about as long either way (GPT-2 small: 31 ms); waiting for each costs 0.6 ms more, half of a small model's.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import NamedSharding

from ...parallel import Layout
from ...parallel.rules import make_spec, split_axes, ways
from ..cache import Cache, KeyValues
from ..model import Params
from ..transformer import Transformer
from .prompts import Prompt
from .sampling import Numbers, draw, forbid, penalise_repetition
from .stopping import BROKEN, NOTHING, RUNNING, STOP_SEQUENCE, Stops

Tree = TypeVar("Tree")


@struct.dataclass
class Memory:
    """The cache and what new tokens need beside it: their next `positions` and `token_types`, if given."""

    cache: Cache
    positions: Any
    token_types: jax.Array | None


@struct.dataclass
class State:
    """Generation after `count` new tokens a row.

    `tokens [B, l + N]` are the new ones after `l` columns of `NOTHING`, `lengths [B]` how many are the
    row's own, `reasons [B]` why it ended, `keys [B]` its source of randomness, `seen [B, V]` which tokens it
    has (only under a repetition penalty).
    """

    memory: Memory
    tokens: jax.Array
    count: jax.Array
    lengths: jax.Array
    reasons: jax.Array
    keys: jax.Array | None
    seen: jax.Array | None


def read_prompt(
    model: Transformer, params: Params, prompt: Prompt, capacity: int, layout: Layout | None
) -> tuple[jax.Array, Memory]:
    """Logits `[B, V]` of the token after the prompt, and the memory of the prompt."""
    split = layout is not None and layout.mesh.size > 1
    cache = Cache.empty(prompt.tokens.shape[0], capacity, joined=False if split else None)
    if prompt.source is None:
        given = {"positions": prompt.positions, "mask": prompt.mask, "segments": prompt.segments}
        if prompt.token_types is not None:
            given["token_types"] = prompt.token_types
        logits, cache = model.apply(params, prompt.tokens, cache=cache, last=True, **given)
    else:
        logits, cache = model.apply(
            params,
            prompt.source,
            segments=prompt.source_segments,
            decoder_tokens=prompt.tokens,
            decoder_segments=prompt.segments,
            cache=cache,
            last=True,
        )
    cache = cache.replace(length=jnp.asarray(cache.length, jnp.int32))
    positions = None if prompt.positions is None else model.config.positions.advance(prompt.positions)
    types = None if prompt.token_types is None else prompt.token_types[:, -1:]
    return _scores(model, logits), Memory(cache, positions, types)


def read_token(
    model: Transformer, params: Params, token: jax.Array, memory: Memory
) -> tuple[jax.Array, Memory]:
    """Logits `[B, V]` after one more token `[B]` a row, and the memory with it."""
    given = {"positions": memory.positions}
    if memory.token_types is not None:
        given["token_types"] = memory.token_types
    if model.config.kind == "encoder-decoder":
        logits, cache = model.apply(
            params, None, decoder_tokens=token[:, None], cache=memory.cache, last=True
        )
    else:
        logits, cache = model.apply(params, token[:, None], cache=memory.cache, last=True, **given)
    positions = None
    if memory.positions is not None:
        positions = model.config.positions.advance(memory.positions)
    return _scores(model, logits), Memory(cache, positions, memory.token_types)


def _scores(model: Transformer, logits: jax.Array) -> jax.Array:
    return logits[:, -1, : model.config.vocab].astype(jnp.float32)


def held(tree: Tree, layout: Layout | None) -> Tree:
    """Arrays `[B, ...]` held, in a traced function, with rows over the data axes; scalars on all devices.

    Keys and values also have their heads over tensor, where these divide. Programs hold all that they return,
    so that the next step finds it where its own program expects it.
    """
    if layout is None or layout.mesh.size == 1:
        return tree

    def hold(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
        axes = [split_axes(layout.rules.mesh_axes(name), layout.mesh) for name in names[: x.ndim]]
        axes = [each if not size % ways(layout.mesh, each) else () for each, size in zip(axes, x.shape)]
        return lax.with_sharding_constraint(x, NamedSharding(layout.mesh, make_spec(axes)))

    def hold_each(part: Any) -> Any:
        if isinstance(part, KeyValues):
            return jax.tree.map(lambda x: hold(x, ("batch", "kv_heads")), part)
        return hold(part, ("batch",))

    return jax.tree.map(hold_each, tree, is_leaf=lambda part: isinstance(part, KeyValues))


@partial(jax.jit, static_argnames=("model", "capacity", "layout"))
def prefill(
    model: Transformer,
    params: Params,
    prompt: Prompt,
    stops: Stops,
    numbers: Numbers,
    keys: jax.Array | None,
    *,
    capacity: int,
    layout: Layout | None = None,
) -> State:
    """Read the prompt and choose the first token."""
    logits, memory = read_prompt(model, params, prompt, capacity, layout)
    rows, width = prompt.tokens.shape
    tokens = jnp.full((rows, stops.span + capacity - width), NOTHING, jnp.int32)
    zero = jnp.zeros(rows, jnp.int32)
    seen = seen_in(prompt, model.config.vocab) if "repetition_penalty" in numbers else None
    state = State(memory, tokens, jnp.int32(0), zero, zero + RUNNING, keys, seen)
    return held(_append(state, logits, stops, numbers), layout)


@partial(jax.jit, static_argnames=("model", "layout"), donate_argnames=("state",))
def decode(
    model: Transformer,
    params: Params,
    state: State,
    stops: Stops,
    numbers: Numbers,
    until: jax.Array,
    ended: jax.Array,
    *,
    layout: Layout | None = None,
) -> tuple[State, jax.Array, jax.Array]:
    """Write tokens until there are `until` or every row has ended: the state, the last tokens, the reasons.

    Rows where `ended [B]` is true end where they are: the host has seen that their text is complete.
    The state is donated: the cache is changed in place. The last tokens and reasons `[B]` are arrays of their
    own, to be read while the next step runs.
    """

    def unfinished(state: State) -> jax.Array:
        return (state.count < until) & (state.reasons == RUNNING).any()

    def step(state: State) -> State:
        token = jnp.maximum(last_token(state, stops), 0)
        logits, memory = read_token(model, params, token, state.memory)
        state = state.replace(memory=memory)  # type: ignore[attr-defined]
        return held(_append(state, logits, stops, numbers), layout)

    reasons = jnp.where(ended & (state.reasons == RUNNING), STOP_SEQUENCE, state.reasons)
    state = state.replace(reasons=reasons)  # type: ignore[attr-defined]
    state = held(lax.while_loop(unfinished, step, state), layout)
    return state, last_token(state, stops), state.reasons


def seen_in(prompt: Prompt, vocab: int) -> jax.Array:
    """Bool `[B, V]`: which tokens of the vocabulary stand in the decoder's prompt."""
    ids = jnp.where(prompt.segments > 0, prompt.tokens, vocab)  # out of bounds: dropped
    rows = jnp.arange(ids.shape[0])[:, None]
    return jnp.zeros((ids.shape[0], vocab), bool).at[rows, ids].set(True, mode="drop")


def last_token(state: State, stops: Stops) -> jax.Array:
    """The latest token of each row, int32 `[B]`; `NOTHING` in rows that had ended before."""
    return lax.dynamic_index_in_dim(state.tokens, stops.span + state.count - 1, 1, keepdims=False)


def _append(state: State, logits: jax.Array, stops: Stops, numbers: Numbers) -> State:
    """Choose a token for each row that has not ended, and see whether that ends it."""
    if state.seen is not None:
        logits = penalise_repetition(logits, state.seen, numbers["repetition_penalty"])
    broken = jnp.isnan(logits).any(-1)
    logits = forbid(logits, stops.tokens, state.count < stops.min_new_tokens)
    token = draw(logits, numbers, state.keys, state.count)
    running = state.reasons == RUNNING
    shown = jnp.where(running, token, NOTHING)
    tokens = lax.dynamic_update_index_in_dim(state.tokens, shown, stops.span + state.count, 1)
    recent = lax.dynamic_slice_in_dim(tokens, state.count + 1, stops.span, 1)
    found = jnp.where(broken, BROKEN, stops.found(recent, state.count + 1))
    reasons = jnp.where(running, found, state.reasons)
    seen = None if state.seen is None else state.seen.at[jnp.arange(len(token)), token].set(True)
    return State(state.memory, tokens, state.count + 1, state.lengths + running, reasons, state.keys, seen)
