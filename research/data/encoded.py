"""Classification examples for a published model: texts, or pairs of texts, as its own tokenizer writes them.

    source = load_source("rte", "train", text_column="sentence1", label_column="label")
    rows = encode_examples(source, tokenizer, Labels.of(source), 256, pair_column="sentence2")

An encoder's tokenizer puts the special tokens around a text, or around and between two, and says which is
whose: `[CLS] a [SEP] b [SEP]` with token types 0 and 1 (BERT), `<s> a </s></s> b </s>` (RoBERTa). A decoder
reads what ends in the token by which its last hidden state is classified: give that as `end`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ... import InputError
from .examples import Examples, Labels
from .padding import rounded_up
from .sources import Source
from .templates import Template

if TYPE_CHECKING:
    from ...models.pretrained.tokenizers import Tokenizer

__all__ = ["encode_examples", "same_length"]


def encode_examples(
    source: Source,
    tokenizer: Tokenizer,
    labels: Labels,
    length: int | None = None,
    *,
    pair_column: str | None = None,
    template: str = "",
    end: int | None = None,
    token_types: bool = True,
    truncate: bool = False,
) -> Examples:
    """The rows of `source` as examples of at most `length` tokens; None: as many as the longest has.

    Args:
        source: with a label column.
        tokenizer: the model's own.
        labels: `Labels.of` the train split.
        length: T; the model's positions, or less.
        pair_column: the column of the second text of a pair.
        template: a text made of several columns, in place of the text column (`Template`).
        end: id that closes each row, and stands between the texts of a pair for which the tokenizer has no
            form of its own; None for encoders.
        token_types: whether the model tells the texts of a pair apart (BERT does).
        truncate: cut longer texts at their end, of a pair the longer first; otherwise they are an error.

    Raises:
        InputError: for a text longer than `length` or without any token, a label that the train split lacks,
            a pair that the tokenizer has no form for.
    """
    if pair_column is not None and template:
        raise InputError(f"pair_column={pair_column!r} and a template are given; the template names columns")
    numbers = labels.ids(source.labels(), source.name)
    room = length if truncate else None
    texts = Template(template).texts(source) if template else list(source.texts())
    if pair_column is None:
        ids = _singles(texts, tokenizer, room, end)
        types = None
    else:
        pairs = _pairs(texts, source.texts_in(pair_column), tokenizer, room, end)
        ids = [row for row, _ in pairs]
        types = [np.asarray(kind, np.int32) for _, kind in pairs] if token_types else None
    rows = [np.asarray(row, np.int32) for row in ids]
    _check_lengths(rows, source.name, length)
    if types is not None and not any(kind.any() for kind in types):
        types = None
    return Examples(rows, numbers, length or _padded(rows), tokenizer.pad, types)


def same_length(splits: Mapping[str, Examples], length: int | None = None) -> dict[str, Examples]:
    """Splits padded alike: to `length`, or to their longest example, so that one program serves them all."""
    most = max(rows.length for rows in splits.values())  # the model may have no more positions
    longest = length or min(most, max(_padded(rows.ids) for rows in splits.values()))
    return {name: replace(rows, length=longest) for name, rows in splits.items()}


def _singles(
    texts: Sequence[str], tokenizer: Tokenizer, room: int | None, end: int | None
) -> list[list[int]]:
    if end is None:
        return tokenizer.encode_all(texts, room, True)
    rows = tokenizer.encode_all(texts, None if room is None else room - 1, True)
    return [_closed(row, end) for row in rows]


def _pairs(
    first: Sequence[str], second: Sequence[str], tokenizer: Tokenizer, room: int | None, end: int | None
) -> list[tuple[list[int], list[int]]]:
    if end is None:
        return [tokenizer.encode_pair(one, two, room) for one, two in zip(first, second)]
    starts = tokenizer.encode_all(first, None, True)
    bodies = tokenizer.encode_all(second, None, False)
    return [_joined(one, two, room, end) for one, two in zip(starts, bodies)]


def _joined(one: list[int], two: list[int], room: int | None, end: int) -> tuple[list[int], list[int]]:
    """Two texts, each closed by `end` (Radford et al., GPT, 2018, section 3.3, with a delimiter between)."""
    from ...models.pretrained.tokenizers.interface import share

    one = one[:-1] if one and one[-1] == end else one
    kept = share(len(one), len(two), None if room is None else room - 2)
    ids = [*one[: kept[0]], end, *two[: kept[1]], end]
    return ids, [0] * (kept[0] + 1) + [1] * (kept[1] + 1)


def _closed(row: list[int], end: int) -> list[int]:
    return row if row and row[-1] == end else [*row, end]


def _padded(rows: Sequence[np.ndarray]) -> int:
    longest = max(len(row) for row in rows)
    return rounded_up(longest)


def _check_lengths(rows: Sequence[np.ndarray], name: str, length: int | None) -> None:
    sizes = [len(row) for row in rows]
    if min(sizes) == 0:
        raise InputError(f"{name}: row {sizes.index(0) + 1} has no token of this model's vocabulary")
    longest = int(np.argmax(sizes))
    if length is not None and sizes[longest] > length:
        raise InputError(
            f"{name}: row {longest + 1} has {sizes[longest]} tokens, the longest allowed {length}; "
            "allow more, up to the model's positions, or truncate (--truncate)"
        )
