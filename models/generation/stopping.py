"""When a row ends: after a stop token, after a stop sequence of tokens, or at a string in its text.

Tokens and sequences of tokens are looked for on the device in every step, strings on the host after every
few steps. What made a row stop stays part of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ... import InputError
from .buckets import bucket

RUNNING, STOP_TOKEN, STOP_SEQUENCE, BROKEN = 0, 1, 2, 3
REASONS = {RUNNING: "length", STOP_TOKEN: "stop_token", STOP_SEQUENCE: "stop_sequence"}
BROKEN_LOGITS = "the model's logits are not numbers (NaN): float16 may overflow; use float32 or bfloat16"
NOTHING = -1
"""Fills arrays of tokens where there is none."""

Decode = Callable[[Sequence[int]], str]
StopTokens = int | Sequence[int] | None
"""An id, several, or none: what a tokenizer without an end token has."""


@struct.dataclass
class Stops:
    """What the device looks for: `tokens [n]`, `sequences [m, l]` filled on the left, and from which step on.

    Both arrays are filled up to buckets with `NOTHING`, so that their number decides on few programs.
    """

    tokens: Any
    sequences: Any
    min_new_tokens: Any

    def found(self, recent: jax.Array, count: jax.Array) -> jax.Array:
        """The reason for which each row stops, int32 `[...]`, or RUNNING.

        `recent [..., l]` are its last tokens, at least one, with `NOTHING` before its first; `count` how many
        new tokens there are with the last one.
        """
        token = ((recent[..., -1:] == self.tokens) & (self.tokens != NOTHING)).any(-1)
        width = self.sequences.shape[1]
        tail = recent[..., None, recent.shape[-1] - width :]
        matches = ((tail == self.sequences) | (self.sequences == NOTHING)).all(-1)
        sequence = (matches & (self.sequences != NOTHING).any(-1)).any(-1)
        reason = jnp.where(token, STOP_TOKEN, jnp.where(sequence, STOP_SEQUENCE, RUNNING))
        return jnp.where(count >= self.min_new_tokens, reason, RUNNING).astype(jnp.int32)

    @property
    def span(self) -> int:
        """How many of the latest tokens `found` looks at."""
        return max(1, self.sequences.shape[1])


def stop_ids(tokens: StopTokens) -> list[int]:
    """The ids that end a row; raises InputError for anything else."""
    ids = [tokens] if isinstance(tokens, int | np.integer) else [] if tokens is None else list(tokens)
    if any(not isinstance(each, int | np.integer) or each < 0 for each in ids):
        raise InputError(f"stop_tokens={ids}; they are ids, whole numbers from 0")
    return [int(each) for each in ids]


def make_stops(
    tokens: StopTokens, sequences: Sequence[Sequence[int] | str], min_new_tokens: int, limit: int
) -> Stops:
    """The device's part of the stopping rules; raises InputError for what can never stop a row."""
    ids = stop_ids(tokens)
    if not 0 <= min_new_tokens <= limit:
        raise InputError(f"min_new_tokens={min_new_tokens} must be from 0 to max_new_tokens={limit}")
    if isinstance(sequences, str) or any(np.ndim(row) != 1 for row in sequences if not isinstance(row, str)):
        raise InputError(f"stop_sequences={sequences!r}; it is a list of strings and of lists of ids")
    numbers = [[int(each) for each in row] for row in sequences if not isinstance(row, str)]
    if any(not row for row in [*numbers, *(row for row in sequences if isinstance(row, str))]):
        raise InputError("stop_sequences has an empty one; each needs at least one token or letter")
    filled = np.full(bucket(len(ids), 4) if ids else 0, NOTHING, np.int32)
    filled[: len(ids)] = ids
    width = bucket(max(map(len, numbers)), 4) if numbers else 0
    table = np.full((bucket(len(numbers), 4) if numbers else 0, width), NOTHING, np.int32)
    for row, sequence in enumerate(numbers):
        table[row, width - len(sequence) :] = sequence
    return Stops(filled, table, np.int32(min_new_tokens))


def stop_strings(sequences: Sequence[Sequence[int] | str], decode: Decode | None) -> tuple[str, ...]:
    """Those of the stop sequences that are strings; raises InputError where nothing decodes tokens."""
    strings = tuple(each for each in sequences if isinstance(each, str))
    if strings and decode is None:
        raise InputError(f"stop_sequences has the string {strings[0]!r}; strings need text_of, ids to text")
    return strings


def first_stop(tokens: Sequence[int], strings: Sequence[str], decode: Decode, start: int) -> int | None:
    """The smallest number of tokens, at least `start`, whose text has one of the strings; None: none has."""

    def found(count: int) -> bool:
        text = decode(tokens[:count])
        return any(string in text for string in strings)

    if not strings or len(tokens) < start or not found(len(tokens)):
        return None
    return next(count for count in range(max(1, start), len(tokens) + 1) if found(count))
