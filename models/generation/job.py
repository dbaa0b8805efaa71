"""One call's generation on the host: the device's state, and what only the host can see, its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ... import InputError
from ...parallel import Layout
from ...parallel.batches import on_host
from ..model import Params
from ..transformer import Transformer
from .padding import Tokens, fill_rows
from .prompts import Prepared, prepare
from .sampling import GREEDY, Sampling
from .steps import decode, prefill
from .stopping import (
    BROKEN,
    BROKEN_LOGITS,
    RUNNING,
    STOP_SEQUENCE,
    Decode,
    StopTokens,
    first_stop,
    make_stops,
    stop_strings,
)


class Job:
    """Prefilled prompts that `advance` continues; in rows where `ended`, the host has seen an end."""

    def __init__(
        self,
        model: Transformer,
        params: Params,
        tokens: Tokens,
        max_new_tokens: int,
        *,
        segments: Any = None,
        decoder_tokens: Tokens | int | None = None,
        inputs: Mapping[str, Any] | None = None,
        sampling: Sampling = GREEDY,
        rng: jax.Array | None = None,
        stop_tokens: StopTokens = (),
        stop_sequences: Sequence[Sequence[int] | str] = (),
        text_of: Decode | None = None,
        min_new_tokens: int = 0,
        layout: Layout | None = None,
    ) -> None:
        prepared = prepare(
            model,
            tokens,
            max_new_tokens,
            segments=segments,
            decoder_tokens=decoder_tokens,
            inputs=inputs,
            layout=layout,
        )
        self.model, self.params, self.layout = model, params, layout
        self.rows, self.limit, self.count = prepared.rows, max_new_tokens, 1
        self.stops = make_stops(stop_tokens, stop_sequences, min_new_tokens, max_new_tokens)
        self.strings, self.text_of = stop_strings(stop_sequences, text_of), text_of
        self.first = max(1, min_new_tokens)
        self.numbers = sampling.numbers()
        self.cuts = np.full(self.rows, max_new_tokens)
        self._begin(prepared, row_keys(sampling, rng, prepared.rows))

    def _begin(self, prepared: Prepared, keys: Any) -> None:
        filled = len(prepared.prompt.tokens)
        if keys is not None:
            data = fill_rows(np.asarray(jax.random.key_data(keys)), filled)
            data = data if self.layout is None else self.layout.place(data)
            keys = jax.random.wrap_key_data(data, impl=jax.random.key_impl(keys))
        self.state = prefill(
            self.model,
            self.params,
            prepared.prompt,
            self.stops,
            self.numbers,
            keys,
            capacity=prepared.capacity,
            layout=self.layout,
        )
        self.ended = np.arange(filled) >= self.rows  # rows that fill up the mesh
        self._look()

    def advance(self, steps: int) -> None:
        """Up to `steps` more tokens in each row that has not ended."""
        self.dispatch(steps)
        self._look()

    def dispatch(self, steps: int) -> tuple[jax.Array, jax.Array]:
        """As `advance`, without looking at the text: the last tokens and the reasons, to be waited for."""
        self.count = min(self.count + steps, self.limit)
        self.state, token, reasons = decode(
            self.model,
            self.params,
            self.state,
            self.stops,
            self.numbers,
            np.int32(self.count),
            self.ended,
            layout=self.layout,
        )
        return token, reasons

    @property
    def unfinished(self) -> bool:
        """Whether any row can go on."""
        if self.count >= self.limit:
            return False
        return bool(self.running(on_host(self.state.reasons)).any())

    def running(self, reasons: np.ndarray) -> np.ndarray:
        """Which rows have not come to their end, bool `[B]`, by the device's `reasons` and by their text.

        Raises InputError where the model has left the numbers.
        """
        require_numbers(reasons)
        return (reasons == RUNNING)[: self.rows] & ~self.ended[: self.rows]

    def outcome(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The new tokens `[B, N]`, how many each row has `[B]`, and why it ended `[B]`."""
        state = on_host((self.state.tokens, self.state.lengths, self.state.reasons))
        tokens, lengths, reasons = (each[: self.rows] for each in state)
        require_numbers(reasons)
        reasons = np.where(self.ended[: self.rows], STOP_SEQUENCE, reasons)
        return tokens[:, self.stops.span :], np.minimum(lengths, self.cuts), reasons

    def _look(self) -> None:
        """End rows in whose text a stop string stands."""
        if not self.strings or self.text_of is None:
            return
        tokens, lengths, _ = self.outcome()
        for row in np.flatnonzero(~self.ended[: self.rows]):
            own = tokens[row, : lengths[row]].tolist()
            stop = first_stop(own, self.strings, self.text_of, self.first)
            if stop is not None:
                self.cuts[row], self.ended[row] = stop, True


def require_numbers(reasons: np.ndarray) -> None:
    """Raise InputError where a row ended because its logits were none."""
    if (reasons == BROKEN).any():
        raise InputError(BROKEN_LOGITS)


def row_keys(sampling: Sampling, rng: jax.Array | None, rows: int) -> jax.Array | None:
    """A key for each row; None where nothing is random."""
    if sampling.greedy:
        return None
    if rng is None:
        raise InputError(f"temperature={sampling.temperature} samples; give rng=jax.random.key(seed)")
    if not jax.numpy.issubdtype(rng.dtype, jax.dtypes.prng_key):
        raise InputError(f"rng is an array of type {rng.dtype}; make a key by jax.random.key(seed)")
    if rng.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(rng, np.arange(rows, dtype=np.uint32))
    if rng.shape != (rows,):
        raise InputError(f"rng has shape {rng.shape}; one key or a key for each of {rows} rows is valid")
    return rng
