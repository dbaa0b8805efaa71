"""In which order the pages of a batch are read, and who asks for them: numbers for the scalar memory.

A row of the batch takes the blocks of keys from the first to the last that one of its queries sees. While one
block is worked on the next is copied, be it of the same row or of the next row that sees anything; so the
kernel must know which row follows and which of the two buffers a row starts with. XLA computes that for all
rows at once, and the kernel keeps no state but its buffers.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from ..trees import AnyArray


class Schedule(NamedTuple):
    """Int32 `[B]` each, but `starts` and `ends [B * T]`: the keys that each query sees.

    `low` and `high` hold them together, blocks `begin` to `stop` hold those. `parity` is the buffer of the
    first block; `leads` says that nobody before asked for it; `following` is the next row that has blocks, -1
    where there is none. Rows of a split, one after the other, know nothing of other splits.
    """

    starts: Array
    ends: Array
    low: Array
    high: Array
    begin: Array
    stop: Array
    parity: Array
    leads: Array
    following: Array


def schedule(starts: AnyArray, ends: AnyArray, keys: int, splits: int) -> Schedule:
    """Of ranges `[B, T]` and blocks of `keys`, the rows in `splits` equal parts."""
    some = starts < ends
    high = jnp.where(some, ends, 0).max(1)
    low = jnp.where(some.any(1), jnp.where(some, starts, jnp.iinfo(jnp.int32).max).min(1), 0)
    begin, stop = low // keys, -(-high // keys)
    blocks = (stop - begin).reshape(splits, -1)
    live = blocks > 0
    row = jnp.arange(live.size, dtype=jnp.int32).reshape(live.shape)
    after = jnp.where(live, row, live.size)[:, 1:]
    after = jnp.pad(after, ((0, 0), (0, 1)), constant_values=live.size)
    following = lax.cummin(after, axis=1, reverse=True)
    numbers = [
        *(starts, ends, low, high, begin, stop),
        (jnp.cumsum(blocks, 1) - blocks) % 2,
        live & (jnp.cumsum(live, 1) == 1),
        jnp.where(following == live.size, -1, following),
    ]
    return Schedule(*(jnp.asarray(number, jnp.int32).reshape(-1) for number in numbers))
