"""`generate` and `stream`: new tokens for a batch of prompts, at once or as they come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import jax
import numpy as np

from ...parallel import Layout
from ...parallel.batches import on_host
from ..model import Params
from ..transformer import Transformer
from .job import Job
from .padding import Tokens, is_single
from .prompts import unrolled
from .sampling import Sampling
from .stopping import NOTHING, REASONS, Decode, StopTokens

CHUNK, DISPATCH = 16, 64
"""Steps of one dispatch: between two looks at the text, where strings end rows (up to so many tokens are
thrown away); and otherwise, where only an interruption from the keyboard has to wait for its end."""


class Options(TypedDict, total=False):
    """What `generate` and `stream` take beside the prompts and `max_new_tokens`.

    segments        `[B, T]` beside an array of prompts: 0 at padding, on either side
    decoder_tokens  of an encoder-decoder: the id that its decoder starts with, or rows of ids
    inputs          more about the prompts, as `Transformer.apply` takes it: `token_types [B, T]` (new tokens
                    get the last column's), `positions`, a pytree of `[B, T, ...]` (continued by
                    `config.positions.advance`), `mask`, a `kernels.Mask` within the prompt, or a function
                    that makes one of the left-padded segments `[B, width of the bucket]`
    sampling        how tokens are chosen; `GREEDY` unless given
    rng             for sampling: one key, of which row i uses its i-th fold, or a key for each row `[B]`;
                    a row's sample depends on its key, not on the batch around it
    stop_tokens     ids that end a row (None: none); they are not chosen before `min_new_tokens`
    stop_sequences  sequences of ids, or strings, that end a row once its new tokens, or their text, have them
                    (from `min_new_tokens` on)
    text_of         a function from ids to text, for strings among `stop_sequences`
    min_new_tokens  how many tokens each row gets at least
    layout          places prompts and cache on its mesh; the parameters lie where the caller has placed them
    """

    segments: Any
    decoder_tokens: Tokens | int | None
    inputs: Mapping[str, Any] | None
    sampling: Sampling
    rng: jax.Array | None
    stop_tokens: StopTokens
    stop_sequences: Sequence[Sequence[int] | str]
    text_of: Decode | None
    min_new_tokens: int
    layout: Layout | None


@dataclass(frozen=True)
class Generated:
    """New tokens int32 `[B, N]`: the first `lengths [B]` of a row are its own, the rest is `pad_token`.

    A stop token or sequence is part of the row that it ended. `reasons` say why each row ended:
    `stop_token`, `stop_sequence` or `length`.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    reasons: tuple[str, ...]

    def rows(self) -> list[np.ndarray]:
        """The tokens of each row without what fills them up."""
        return [row[:length] for row, length in zip(self.tokens, self.lengths)]


def generate(
    model: Transformer,
    params: Params,
    tokens: Tokens,
    *,
    max_new_tokens: int,
    pad_token: int = 0,
    **options: Unpack[Options],
) -> Generated:
    """Continue each prompt by up to `max_new_tokens` tokens; `options` are those of `Options`.

    `tokens` are an array `[B, T]` (with `segments`), rows of unequal lengths, or one row of ids; the
    encoder's input in an encoder-decoder.

    Programs are compiled per bucket of lengths, number of rows and choice of processors; numbers such as
    the temperature are not part of them. A model with scanned layers is unstacked in each call, see
    `unrolled`.

    Raises InputError for prompts, options or lengths that the model cannot take, and for logits that are NaN.
    """
    job = Job(*unrolled(model, params), tokens, max_new_tokens, **options)
    while job.unfinished:
        job.advance(CHUNK if job.strings else DISPATCH)
    new, lengths, reasons = job.outcome()
    new = np.where(np.arange(lengths.max()) < lengths[:, None], new[:, : lengths.max()], pad_token)
    return Generated(new.astype(np.int32), lengths, tuple(REASONS[int(reason)] for reason in reasons))


def stream(
    model: Transformer, params: Params, tokens: Tokens, *, max_new_tokens: int, **options: Unpack[Options]
) -> Iterator[Any]:
    """The tokens of `generate` as they come, for the same arguments; what cannot be done raises at once.

    Yields an int for each token where `tokens` is one row of ids; otherwise an int32 array `[B]` for each
    step, with -1 in rows that have ended.
    """
    job = Job(*unrolled(model, params), tokens, max_new_tokens, **options)
    steps = _steps(job)
    return (int(step[0]) for step in steps) if is_single(tokens) else steps


def _steps(job: Job) -> Iterator[np.ndarray]:
    """The new tokens `[B]` of each step; the device works on the next one while the caller has this one."""
    tokens, _, reasons = job.outcome()
    latest, running = tokens[:, 0], job.running(reasons)
    while job.count < job.limit and running.any():
        if job.strings:  # the text decides what comes next
            job.advance(1)
            yield latest
            tokens, lengths, _ = job.outcome()
            latest = np.where(lengths == job.count, tokens[:, job.count - 1], NOTHING)
            running = job.running(on_host(job.state.reasons))
        else:
            following = job.dispatch(1)
            yield latest
            latest, reasons = on_host(following)
            latest, running = latest[: job.rows], job.running(reasons)
    yield latest
