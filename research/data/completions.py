"""Text-to-text examples: a prompt that the model is given, and the text that it is to write.

    rows = encode_completions(source, tokenizer, target_column="label", template="{text} It was", end=eos)

A decoder reads both as one text and learns the second part of it; an encoder-decoder (`start` given) reads
the prompt in its encoder. A row gives tokens, segments and positions int32 [T]; an encoder-decoder's also
decoder_tokens, decoder_segments and decoder_positions int32 [U]; targets int32 and weights float32, 1 where a
target belongs to the text that is to be written and 0 elsewhere, [T] or [U].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ... import InputError
from .padding import filled, rounded_up, token_fields
from .sources import Source
from .templates import Template

if TYPE_CHECKING:
    from ...models.pretrained.tokenizers import Tokenizer

__all__ = ["Completions", "encode_completions", "same_lengths"]


class Lengths(NamedTuple):
    """T and, for an encoder-decoder, U."""

    tokens: int
    targets: int


@dataclass(frozen=True)
class Completions:
    """Encoded examples; `rows[i]` is one row's fields as numpy arrays.

    Attributes:
        prompts: what the model is given of each example, ids.
        completions: what it is to write, ids, the end token included.
        answers: the same as texts.
        lengths: what rows are padded to.
        start: id that an encoder-decoder's decoder starts with; None for a decoder.
        pad: the token that fills rows.
    """

    prompts: Sequence[Sequence[int]]
    completions: Sequence[Sequence[int]]
    answers: Sequence[str]
    lengths: Lengths
    start: int | None = None
    pad: int = 0

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        prompt, completion = self.prompts[index], self.completions[index]
        if self.start is None:
            whole = [*prompt, *completion]
            weights = [0.0] * (len(prompt) - 1) + [1.0] * len(completion)
            return token_fields(whole[:-1], self.lengths.tokens, self.pad) | self._learned(whole[1:], weights)
        decoder = token_fields([self.start, *completion[:-1]], self.lengths.targets, self.pad, "decoder_")
        source = token_fields(prompt, self.lengths.tokens, self.pad)
        return source | decoder | self._learned(completion, [1.0] * len(completion))

    def _learned(self, targets: Sequence[int], weights: Sequence[float]) -> dict[str, np.ndarray]:
        length = self.lengths.tokens if self.start is None else self.lengths.targets
        shares = filled(weights, length, 0, np.float32)
        return {"targets": filled(targets, length, self.pad), "weights": shares}


def encode_completions(
    source: Source,
    tokenizer: Tokenizer,
    length: int | None = None,
    *,
    target_column: str,
    template: str = "",
    end: int | None = None,
    start: int | None = None,
    truncate: bool = False,
) -> Completions:
    """The rows of `source` as prompts and what is to be written.

    Args:
        source: of its text column, or of the columns that `template` names, prompts are made.
        tokenizer: the model's own.
        length: tokens of a decoder's longest prompt and completion together, of an encoder-decoder's longest
            of each; None: as many as it takes.
        target_column: the column of the texts to be written.
        template: a text with columns in braces (`Template`).
        end: id that ends what is written.
        start: id that an encoder-decoder's decoder starts with; None for a decoder.
        truncate: cut longer prompts; of a decoder's the beginning goes, since the end leads to the answer.

    Raises:
        InputError: for a text longer than `length`, an empty prompt, a tokenizer without an end token.
    """
    if end is None:
        raise InputError("the tokenizer names no end token, by which the model would know where to stop")
    texts = Template(template).texts(source) if template else list(source.texts())
    answers = source.texts_in(target_column)
    if start is None:
        pairs = _continued(texts, answers, tokenizer, end)
    else:
        written = [_open(ids, end) for ids in tokenizer.encode_all(answers, None, True)]
        pairs = list(zip(tokenizer.encode_all(texts, length if truncate else None, True), written))
    pairs = [(prompt, [*answer, end]) for prompt, answer in pairs]
    if truncate and start is None and length is not None:
        pairs = [(_last(prompt, length - len(answer), tokenizer.bos), answer) for prompt, answer in pairs]
    _check(pairs, source.name, length, together=start is None)
    prompts, completions = ([pair[side] for pair in pairs] for side in (0, 1))
    return Completions(prompts, completions, answers, _lengths(pairs, start, length), start, tokenizer.pad)


def same_lengths(splits: Mapping[str, Completions]) -> dict[str, Completions]:
    """Splits padded alike, so that one program serves them all."""
    longest = Lengths(*(max(sizes) for sizes in zip(*(rows.lengths for rows in splits.values()))))
    return {name: replace(rows, lengths=longest) for name, rows in splits.items()}


def joined(prompt: str, answer: str) -> str:
    """A prompt and what follows it: a space between them, unless the prompt ends in one."""
    return prompt + answer if prompt[-1:].isspace() else f"{prompt} {answer}"


def _continued(
    prompts: Sequence[str], answers: Sequence[str], tokenizer: Tokenizer, end: int
) -> list[tuple[list[int], list[int]]]:
    """The ids of each prompt, and those that continue it.

    A word begins otherwise in the middle of a text than at its start, so the answer's ids are those it has in
    the whole text; where a tokenizer would read across the border, they are its own.
    """
    starts = [_open(ids, end) for ids in tokenizer.encode_all(prompts, None, True)]
    texts = [joined(prompt, answer) for prompt, answer in zip(prompts, answers)]
    wholes = [_open(ids, end) for ids in tokenizer.encode_all(texts, None, True)]
    alone = tokenizer.encode_all(answers, None, False)
    return [
        (begun, whole[len(begun) :] if whole[: len(begun)] == begun else own)
        for begun, whole, own in zip(starts, wholes, alone)
    ]


def _open(ids: list[int], end: int) -> list[int]:
    """The ids without the end that some tokenizers put after every text."""
    return ids[:-1] if ids and ids[-1] == end else ids


def _last(ids: list[int], room: int, begin: int | None) -> list[int]:
    """The last `room` ids, after the token that begins a text where there is one."""
    if len(ids) <= room or room < 1:
        return ids
    kept = ids[len(ids) - room :]
    return [begin, *kept[1:]] if ids[0] == begin and begin is not None else kept


def _lengths(pairs: Sequence[tuple[list[int], list[int]]], start: int | None, length: int | None) -> Lengths:
    def padded(size: int) -> int:
        # At most `length`: the model may have no more positions.
        return rounded_up(size) if length is None else min(rounded_up(size), length)

    answers = max(len(answer) for _, answer in pairs)
    if start is None:
        return Lengths(padded(max(len(prompt) + len(answer) for prompt, answer in pairs) - 1), 0)
    return Lengths(padded(max(len(prompt) for prompt, _ in pairs)), padded(answers))


def _check(
    pairs: Sequence[tuple[list[int], list[int]]], name: str, length: int | None, together: bool
) -> None:
    for row, (prompt, answer) in enumerate(pairs, start=1):
        if not prompt:
            raise InputError(f"{name}: row {row} has no token of this model's vocabulary in its prompt")
        size = len(prompt) + len(answer) if together else max(len(prompt), len(answer))
        if length is not None and size > length:
            both = "prompt and target have" if together else "prompt or target has"
            raise InputError(
                f"{name}: row {row}'s {both} {size} tokens, the longest allowed {length}; "
                "allow more, up to the model's positions, or truncate (--truncate)"
            )
