"""The key-value cache: what attention keeps of the tokens so far, as a value that `apply` takes and returns.

logits, cache = model.apply(params, prompt, segments=segments, cache=Cache.empty(batch, capacity))
logits, cache = model.apply(params, token, cache=cache)          # token [B, 1]

A cache has room for `capacity` tokens a row, and who appends has to count: more would overwrite the last of
them, and no error can be raised while a program runs. Each call appends its T tokens to every row; padding
has segment 0 and is never seen. Where a bias or window counts distances by index, pad on the left: then the
distance in the cache is that in the text. Attention knows a cache by `Store` and `Entries` alone; `Slots` and
`KeyValues` are the contiguous pair, which `generation.steps.held` splits over a mesh; a paged one is another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from .. import InputError
from .kernels import Joined

COLLECTION = "cache"
CROSS = "cross_attention"  # the layer that keeps keys and values of the encoder's output
LENGTH = -2  # the axis over slots, in either form


class Entries(Protocol):
    """What a cache holds of one attention layer, a pytree."""

    def read(self) -> tuple[Any, Any]:
        """Keys and values as `attention` or `decode_attention` takes them, `[B, S, G, K]`."""


class Store(Protocol):
    """Where the keys and values of one call go: all that an attention layer asks of a cache."""

    @property
    def start(self) -> int | jax.Array:
        """How many tokens came before those of the call."""

    def append(self, stored: Any, key: jax.Array, value: jax.Array) -> tuple[Any, Any, Any]:
        """The layer's new `Entries` (None in the first call), and what the call's queries look at.

        `key` and `value` are those of the call's tokens, `[B, T, G, K]`.
        """

    def keep(self, key: jax.Array, value: jax.Array) -> Any:
        """`Entries` that later calls only read: those of an encoder's output `[B, S, G, K]`."""


@struct.dataclass
class KeyValues:
    """Keys and values of one attention layer, both `[B, G, S, K]`, or on a CPU `Joined` `[B·G, S, K]`."""

    keys: jax.Array | Joined
    values: jax.Array | Joined

    @classmethod
    def of(cls, key: jax.Array, value: jax.Array, joined: bool) -> KeyValues:
        """Those of `key` and `value` `[B, S, G, K]`."""
        if joined:
            return cls(Joined.of(key), Joined.of(value))
        return cls(jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2))

    def read(self) -> tuple[Any, Any]:
        """Both as attention takes them, `[B, S, G, K]`."""
        both = self.keys, self.values
        key, value = (x if isinstance(x, Joined) else jnp.swapaxes(x, 1, 2) for x in both)
        return key, value

    def rows(self, indices: jax.Array) -> KeyValues:
        """Those of the batch rows at `indices`."""
        return KeyValues(*(_take_rows(x, indices) for x in (self.keys, self.values)))


@struct.dataclass
class Slots:
    """The `Store` of a contiguous cache: tokens stand from `start` on, in `capacity` slots a row."""

    start: int | jax.Array
    capacity: int = struct.field(pytree_node=False)
    joined: bool = struct.field(pytree_node=False)

    def append(
        self, stored: KeyValues | None, key: jax.Array, value: jax.Array
    ) -> tuple[KeyValues, Any, Any]:
        """The layer's new entries, and the keys and values `[B, S, G, K]` that the call's queries look at.

        The first call looks at its own T tokens only, later ones at all slots.
        """
        new = KeyValues.of(key, value, self.joined)
        if stored is None:
            return jax.tree.map(lambda x: _grown(x, LENGTH, self.capacity), new), key, value
        start = jnp.asarray(self.start, jnp.int32)
        entries = jax.tree.map(
            lambda old, x: lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), start, x.ndim + LENGTH),
            stored,
            new,
        )
        return entries, *entries.read()

    def keep(self, key: jax.Array, value: jax.Array) -> KeyValues:
        """All of them, in a cache's form."""
        return KeyValues.of(key, value, self.joined)


@struct.dataclass
class Cache:
    """Everything that a model remembers of `length` tokens a row.

    `entries` has a `KeyValues` for each attention layer under the layer's path. `segments` `[B, S]` are 0 at
    padding and empty slots, `positions` what the model's positions are of each slot. An encoder-decoder
    also keeps the keys and values of the encoder's output and its segments.
    """

    entries: Mapping[str, Any]
    segments: jax.Array
    positions: Any
    length: int | jax.Array
    memory_segments: jax.Array | None = None
    joined: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def empty(cls, batch: int, capacity: int, *, joined: bool | None = None) -> Cache:
        """A cache without tokens, with room for `capacity` in each of `batch` rows.

        `joined` keeps batch and heads as one axis; None means on CPUs. Over a mesh they must stay two.
        """
        if capacity < 1:
            raise InputError(f"a cache has capacity={capacity}; at least 1 is valid")
        joined = jax.default_backend() == "cpu" if joined is None else joined
        return cls({}, jnp.zeros((batch, capacity), jnp.int32), None, 0, joined=joined)

    @property
    def store(self) -> Store:
        """Where the next call's keys and values go."""
        return Slots(self.length, self.capacity, self.joined)

    @property
    def capacity(self) -> int:
        """S, the slots of a row."""
        return self.segments.shape[1]

    @property
    def fresh(self) -> bool:
        """Whether no call has used it yet; known while tracing."""
        return not self.entries

    def extended(self, segments: jax.Array, positions: Any) -> Cache:
        """The cache with room taken for tokens of these segments `[B, T]`; their entries are to follow.

        Raises `InputError` for more tokens than there is room for, where the length is known: in a program
        that is given a cache it is not, and what is too much replaces the last tokens. Also for positions of
        another kind than those of the tokens before.
        """
        tokens = segments.shape[1]
        held = 0 if self.fresh else self.length
        if isinstance(held, int) and held + tokens > self.capacity:
            more = f" after {held}" if held else ""
            raise InputError(f"{tokens} tokens{more} do not fit a cache of capacity {self.capacity}")
        if self.fresh:
            grown = jax.tree.map(lambda x: _grown(x, 1, self.capacity), (segments, positions))
            return replace(self, segments=grown[0], positions=grown[1], length=tokens)
        _require_alike(self.positions, positions)
        start = jnp.asarray(self.length, jnp.int32)
        old, new = (self.segments, self.positions), (segments, positions)
        grown = jax.tree.map(
            lambda a, b: lax.dynamic_update_slice_in_dim(a, b.astype(a.dtype), start, 1), old, new
        )
        return replace(self, segments=grown[0], positions=grown[1], length=self.length + tokens)

    def next_positions(self, segments: jax.Array) -> jax.Array:
        """Positions `[B, T]` of tokens to append: how many real tokens stand before each in its row."""
        before = (self.segments > 0).sum(1, keepdims=True)
        return jnp.maximum(before + jnp.cumsum(segments > 0, 1) - 1, 0)

    def rows(self, indices: jax.Array) -> Cache:
        """The cache whose row i is row `indices[i]` of this one."""
        entries = jax.tree.map(
            lambda entry: entry.rows(indices), self.entries, is_leaf=lambda x: isinstance(x, KeyValues)
        )
        others = jax.tree.map(
            lambda x: x if jnp.ndim(x) == 0 else jnp.take(x, indices, axis=0), replace(self, entries={})
        )
        return replace(others, entries=entries)

    def exchanged(self, indices: jax.Array) -> Cache:
        """`rows` among rows (beams) that read one encoder's output: what is kept of that stays in place."""
        taken = self.rows(indices)
        entries = jax.tree_util.tree_map_with_path(
            lambda path, old, new: old if any(getattr(key, "key", "") == CROSS for key in path) else new,
            self.entries,
            taken.entries,
        )
        return replace(taken, entries=entries, memory_segments=self.memory_segments)

    def repeat(self, times: int) -> Cache:
        """Each row `times` times, one after another."""
        return self.rows(jnp.repeat(jnp.arange(self.segments.shape[0]), times))


def _grown(x: jax.Array, axis: int, size: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def _take_rows(x: jax.Array | Joined, indices: jax.Array) -> jax.Array | Joined:
    if not isinstance(x, Joined):
        return jnp.take(x, indices, axis=0)
    split = x.array.reshape(-1, x.groups, *x.array.shape[1:])
    taken = jnp.take(split, indices, axis=0)
    return Joined(taken.reshape(-1, *x.array.shape[1:]), x.groups)


def _require_alike(held: Any, given: Any) -> None:
    """Raise `InputError` where a call's positions are of another kind than those that the cache holds."""
    shapes = [jax.tree.map(lambda leaf: leaf.shape[2:], each) for each in (held, given)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"a token's positions have the shapes {shapes[1]}, in the cache they have {shapes[0]}; "
            f"give positions=, as config.positions.advance makes them"
        )
