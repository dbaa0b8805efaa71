"""Prompts as the jitted steps take them: checked, padded to buckets, placed on the mesh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace as with_changes
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import struct
from flax.linen import module as linen

from ... import InputError
from ...parallel import Layout
from ..heads import LanguageModelHead
from ..kernels import Mask
from ..model import Params
from ..stacking import unstack_layers
from ..transformer import Transformer
from .buckets import NEW, PROMPT, bucket
from .padding import Tokens, as_rows, check_segments, fill_rows, moved

INPUTS = ("positions", "token_types", "mask")


@struct.dataclass
class Prompt:
    """What generation starts from: left-padded `tokens` and `segments` `[B, T]`, 0 at padding, 1 elsewhere.

    `positions`, a pytree of `[B, T, ...]`, and `token_types [B, T]` may be given, and a `mask` that says who
    sees whom within the prompt. `source` and `source_segments` are the encoder's, padded on the right.
    """

    tokens: Any
    segments: Any
    positions: Any = None
    token_types: Any = None
    mask: Mask | None = None
    source: Any = None
    source_segments: Any = None


class Prepared(NamedTuple):
    """A prompt with its rows filled up to what the mesh divides, of which the first `rows` count."""

    prompt: Prompt
    rows: int
    capacity: int


def unrolled(model: Transformer, params: Params) -> tuple[Transformer, Params]:
    """The model with unrolled layers, as decoding needs it: a scanned one's parameters are unstacked.

    Unstacking copies the parameters of the layers. Of a scanned model call this once and generate from what
    it returns; `generate` does it anew in each call. An unrolled model is returned as it is.

    Raises InputError for anything but a `Transformer`.
    """
    if not isinstance(model, Transformer):
        raise InputError(
            f"the model is a {type(model).__name__}; generating needs a Transformer (of a delta on one, "
            f"research.delta.as_transformer makes it)"
        )
    if not model.config.scan:
        return model, params
    config = with_changes(model.config, scan=False)
    return with_changes(model, config=config), unstack_layers(params, model.config.period)


def prepare(
    model: Transformer,
    tokens: Tokens,
    max_new_tokens: int,
    *,
    segments: Any = None,
    decoder_tokens: Tokens | int | None = None,
    inputs: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
) -> Prepared:
    """Check a caller's prompt and bring it to its bucket, see `generate` for the arguments."""
    _check_model(model)
    rows, real = _rows(tokens, segments, "tokens")
    given = {name: value for name, value in (inputs or {}).items() if value is not None}
    for name in given:
        if name not in INPUTS:
            raise InputError(f"inputs has {name!r}; valid: {', '.join(INPUTS)}")
    if model.config.kind == "decoder":
        if decoder_tokens is not None:
            raise InputError("decoder_tokens are given, but the model is a decoder: its prompt is `tokens`")
        _check_tokens(model, rows, real, "tokens")
        prompt, capacity = _prompt(model, rows, real, max_new_tokens, PROMPT, given)
    else:
        prompt, capacity = _with_source(model, rows, real, decoder_tokens, max_new_tokens, given)
    return Prepared(_placed(prompt, layout), len(rows), capacity)


def _check_model(model: Transformer) -> None:
    config = model.config
    if config.kind == "encoder" or not isinstance(model.head, LanguageModelHead):
        head = type(model.head).__name__
        raise InputError(
            f"the model is of kind {config.kind!r} with head {head}; generating needs a decoder or an "
            f"encoder-decoder with LanguageModelHead"
        )
    if config.scan:
        raise InputError("decoding runs on unrolled layers, scan=True here; call generation.unrolled first")
    if getattr(linen, "_global_interceptor_stack", None):
        raise InputError(
            "an interceptor is active around generation, whose programs are compiled once and kept; "
            "enter it inside the apply of a class derived from Transformer"
        )


def _rows(tokens: Tokens, segments: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    array, real = as_rows(tokens, name)
    if segments is not None:
        try:
            given = np.asarray(segments)
        except ValueError as error:
            raise InputError(
                f"segments have rows of unequal lengths; beside {name} it must be {array.shape}"
            ) from error
        real = check_segments(array, given[None] if given.ndim == 1 else given)
    return array, (real != 0).astype(np.int32)


def _check_tokens(model: Transformer, tokens: np.ndarray, segments: np.ndarray, name: str) -> None:
    ids, rows = tokens[segments > 0], model.config.vocab + model.config.input_rows
    if ids.min() < 0 or ids.max() >= rows:
        wrong = ids.max() if ids.max() >= rows else ids.min()
        raise InputError(f"{name} hold the id {wrong}; the model has the ids 0 to {rows - 1}")


def _prompt(
    model: Transformer,
    tokens: np.ndarray,
    segments: np.ndarray,
    new: int,
    smallest: int,
    given: Mapping[str, Any],
) -> tuple[Prompt, int]:
    """The decoder's prompt in its bucket, and the capacity of the cache for it and the new tokens."""
    if new < 1:
        raise InputError(f"max_new_tokens={new}; at least 1 is valid")
    longest, limit = int(segments.sum(1).max()), model.config.positions.limit
    if limit is not None and longest + new > limit:
        raise InputError(
            f"a prompt of {longest} tokens and max_new_tokens={new} exceed the model's {limit} positions; "
            f"at most {limit - longest} new tokens are valid"
        )
    width = bucket(longest, smallest)
    width = width if limit is None else min(width, limit)
    mask = given.get("mask")
    arrays = {name: value for name, value in given.items() if name != "mask"}
    arrays |= {"tokens": tokens, "segments": segments}
    arrays = {name: moved(value, segments, width, "left") for name, value in arrays.items()}
    if mask is not None and not isinstance(mask, Mask):
        mask = mask(arrays["segments"])
    return Prompt(mask=mask, **arrays), width + bucket(new, NEW)


def _with_source(
    model: Transformer,
    source: np.ndarray,
    source_segments: np.ndarray,
    decoder_tokens: Tokens | int | None,
    new: int,
    given: Mapping[str, Any],
) -> tuple[Prompt, int]:
    """The encoder's input, and where the decoder starts: the same id in each row, or rows of ids."""
    if decoder_tokens is None:
        raise InputError("an encoder-decoder needs decoder_tokens: the id it starts with, or rows of ids")
    if given:
        raise InputError(f"inputs has {min(given)!r}; an encoder-decoder takes none")
    _check_tokens(model, source, source_segments, "tokens")
    if isinstance(decoder_tokens, int | np.integer):
        decoder_tokens = np.full((len(source), 1), decoder_tokens)
    rows, real = _rows(decoder_tokens, None, "decoder_tokens")
    if len(rows) != len(source):
        raise InputError(f"decoder_tokens have {len(rows)} rows; beside tokens they must be {len(source)}")
    _check_tokens(model, rows, real, "decoder_tokens")
    longest = int(source_segments.sum(1).max())
    model.config.positions.require(longest)
    width = bucket(longest, PROMPT)
    width = width if model.config.positions.limit is None else min(width, model.config.positions.limit)
    prompt, capacity = _prompt(model, rows, real, new, 1, {})
    pair = moved((source, source_segments), source_segments, width, "right")
    return prompt.replace(source=pair[0], source_segments=pair[1]), capacity  # type: ignore[attr-defined]


def _placed(prompt: Prompt, layout: Layout | None) -> Prompt:
    """Rows over the mesh's data axes, filled up to a number that divides."""
    if layout is None:
        return prompt
    if layout.mesh.shape["context"] > 1:
        raise InputError(
            f"mesh axis context={layout.mesh.shape['context']}: generation splits rows and heads, "
            f"not the length; use data, fsdp and tensor"
        )
    rows = layout.fitting_rows(len(prompt.tokens))
    mask, arrays = prompt.mask, prompt.replace(mask=None)  # type: ignore[attr-defined]
    placed = layout.place(fill_rows(arrays, rows))
    if mask is not None:
        filled = jax.tree.map(lambda x: fill_rows(x, rows) if _has_rows(x, prompt) else x, mask)
        placed = placed.replace(mask=jax.device_put(filled, layout.replicated()))
    return placed


def _has_rows(leaf: Any, prompt: Prompt) -> bool:
    return np.ndim(leaf) > 0 and np.shape(leaf)[0] == len(prompt.tokens)
