"""Perplexity of a text longer than the model's window, by a window that slides over it in strides.

Each window of `window` tokens begins `stride` tokens after the one before it and scores the tokens that
no window before it has scored: a token is predicted from at least `window - stride` tokens before it, once
the text is that long. The windows are those of the Hugging Face documentation ("Perplexity of fixed-length
models"); the mean here is over the scored tokens exactly, while the code shown there weighs each window by
one token less than it scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ... import InputError
from ...models import Params, Transformer
from ...parallel import Layout
from ...parallel.batches import on_host


class Window(NamedTuple):
    """Tokens `start` to `stop` of a text, of which those from `scored` on are scored."""

    start: int
    stop: int
    scored: int


@dataclass(frozen=True)
class Perplexity:
    """The negative log-likelihood of a text in nats, `nats`, summed over `scored` of its tokens."""

    nats: float
    scored: int
    windows: int

    @property
    def perplexity(self) -> float:
        """exp of the mean nats a scored token; infinity where that is larger than any float."""
        try:
            return math.exp(self.nats / self.scored)
        except OverflowError:
            return math.inf

    @property
    def bits_per_token(self) -> float:
        """Mean bits a scored token."""
        return self.nats / self.scored / math.log(2)

    def bits_per_byte(self, size: int) -> float:
        """Bits in all over the `size` of the text in bytes, which does not depend on the tokenizer."""
        if size < 1:
            raise InputError(f"the text has {size} bytes; at least 1 is valid")
        return self.nats / math.log(2) / size


def windows(length: int, window: int, stride: int) -> Iterator[Window]:
    """The windows over `length` tokens; the last ends with the text.

    The first token of a text has nothing before it and is not scored; nor, where `stride` equals
    `window`, is the first of any window.
    """
    done = 1
    for start in range(0, length, stride):
        stop = min(start + window, length)
        scored = max(done, start + 1)
        if scored < stop:
            yield Window(start, stop, scored)
        done = stop
        if stop == length:
            return


def strided_perplexity(
    model: Transformer,
    params: Params,
    tokens: Sequence[int] | np.ndarray,
    *,
    window: int,
    stride: int = 0,
    rows: int = 8,
    layout: Layout | None = None,
) -> Perplexity:
    """Perplexity of a decoder on one text, `tokens [N]`.

    `stride` 0 is half a window; small strides give each token more context and cost more. `rows` windows
    are read at once, by one program that is compiled once.

    Raises InputError for a window or stride that the model or the text does not allow.
    """
    text = np.asarray(tokens, np.int32)
    stride = stride or max(1, window // 2)
    _check(model, text, window, stride, rows)
    places = list(windows(len(text), window, stride))
    # The model is called as it is, and would take columns in another order for neighbours.
    layout = layout and replace(layout, order="contiguous")
    rows = rows if layout is None else layout.fitting_rows(rows)
    nats, scored = 0.0, 0
    for start in range(0, len(places), rows):
        batch = _batch(text, places[start : start + rows], window, rows)
        placed = batch if layout is None else layout.place(batch)
        nats += float(on_host(_row_nats(model, params, *placed)).astype(np.float64).sum())
        scored += int(batch[2].sum())
    return Perplexity(nats, scored, len(places))


def _check(model: Transformer, text: np.ndarray, window: int, stride: int, rows: int) -> None:
    if model.config.kind != "decoder":
        raise InputError(f"the model is of kind {model.config.kind!r}; perplexity is of a decoder")
    if text.ndim != 1 or len(text) < 2:
        raise InputError(f"tokens have shape {text.shape}; at least 2 in one row are needed")
    if text.min() < 0 or text.max() >= model.config.vocab:
        raise InputError(
            f"tokens lie in {text.min()} to {text.max()}; the model has {model.config.vocab} ids"
        )
    if window < 2 or not 1 <= stride <= window or rows < 1:
        raise InputError(
            f"window={window}, stride={stride}, rows={rows}; valid is window >= 2, "
            f"1 <= stride <= window, rows >= 1"
        )
    model.config.positions.require(window)


def _batch(text: np.ndarray, places: Sequence[Window], window: int, rows: int) -> tuple[np.ndarray, ...]:
    """Tokens, segments and weights of targets, all `[rows, window]`, padded on the right."""
    tokens, segments, scored = np.zeros((3, rows, window), np.int32)
    for row, place in enumerate(places):
        size = place.stop - place.start
        tokens[row, :size], segments[row, :size] = text[place.start : place.stop], 1
        scored[row, place.scored - place.start : size] = 1
    return tokens, segments, scored


@partial(jax.jit, static_argnames=("model",))
def _row_nats(
    model: Transformer, params: Params, tokens: jax.Array, segments: jax.Array, scored: jax.Array
) -> jax.Array:
    """Negative log-likelihood `[rows]` of the tokens where `scored` is 1."""
    logits = model.apply(params, tokens, segments=segments)[:, :-1, : model.config.vocab]
    return (token_nats(logits, tokens[:, 1:]) * scored[:, 1:]).sum(1)


def token_nats(logits: Any, targets: Any) -> jax.Array:
    """Negative log-likelihood `[B, T]` of `targets [B, T]` under `logits [B, T, V]`, in float32."""
    wide = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(wide, targets[..., None], -1)[..., 0]
    return jax.nn.logsumexp(wide, -1) - chosen
