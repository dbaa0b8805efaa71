"""What every tokenizer does: text to ids and back, and texts to one padded batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .... import InputError

SIDES = ("left", "right")


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that stand for no text.

    `pad` fills the rows of a batch (the end token's id, or 0, where the files name none); `bos` and `eos`
    begin and end a sequence, None where the tokenizer has no such token; `all` holds these and the rest.
    """

    pad: int = 0
    bos: int | None = None
    eos: int | None = None
    all: frozenset[int] = frozenset()


class Tokenizer(ABC):
    """Text to ids and back, as a published model was trained with.

    Implementations have `tokens: SpecialTokens`.
    """

    tokens: SpecialTokens

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """How many ids there are, added tokens included; a model's embedding table may have more rows."""

    @abstractmethod
    def encode_all(self, texts: Sequence[str], limit: int | None, special: bool) -> list[list[int]]:
        """The ids of each text, at most `limit` each: text is dropped at its end, special tokens stay."""

    def encode_pair(self, first: str, second: str, limit: int | None) -> tuple[list[int], list[int]]:
        """The ids of two texts as one input, and for each whose it is, 0 or 1; at most `limit`.

        The longer text is cut first. Raises `InputError` where the tokenizer has no form for them.
        """
        raise InputError("this tokenizer has no form for pairs of texts; join them as the model expects")

    @abstractmethod
    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of some ids; `special` keeps the special tokens among them as text."""

    @property
    def pad(self) -> int:
        """Id that fills the rows of a batch."""
        return self.tokens.pad

    @property
    def bos(self) -> int | None:
        """Id that begins a sequence."""
        return self.tokens.bos

    @property
    def eos(self) -> int | None:
        """Id that ends a sequence."""
        return self.tokens.eos

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The ids of one text; `special` puts the tokens around it that the model was trained with."""
        return self.encode_all([text], None, special)[0]

    def encode_batch(
        self, texts: Sequence[str], length: int | None = None, side: str = "right", special: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and segments, int32 `[B, T]`, of `texts`; segments are 1 at tokens and 0 at padding.

        T is `length`, to which longer texts are cut, or that of the longest text. `side` is where the
        padding goes: "left" for generation.
        """
        rows = self.encode_all(texts, length, special)
        return _rectangle(rows, self.pad, length, side), _rectangle(
            [[1] * len(r) for r in rows], 0, length, side
        )

    def encode_pairs(
        self, first: Sequence[str], second: Sequence[str], length: int | None = None, side: str = "right"
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, segments and token types, int32 `[B, T]`, of pairs of texts (question and passage, ...).

        Token types are 0 in the first text, 1 in the second where the model tells them apart (BERT).
        """
        if len(first) != len(second):
            raise InputError(f"{len(first)} first and {len(second)} second texts; as many of each are valid")
        pairs = [self.encode_pair(one, two, length) for one, two in zip(first, second)]
        tokens = _rectangle([ids for ids, _ in pairs], self.pad, length, side)
        segments = _rectangle([[1] * len(ids) for ids, _ in pairs], 0, length, side)
        return tokens, segments, _rectangle([types for _, types in pairs], 0, length, side)


def _rectangle(rows: Sequence[Sequence[int]], fill: int, length: int | None, side: str) -> np.ndarray:
    """Rows of integers as one array, int32 `[B, T]`."""
    if side not in SIDES:
        raise InputError(f"side={side!r} is not one of {', '.join(SIDES)}")
    if not rows:
        raise InputError("texts is empty; a batch needs at least one")
    width = length or max(1, *map(len, rows))
    array = np.full((len(rows), width), fill, np.int32)
    for index, row in enumerate(rows):
        array[index, slice(width - len(row), width) if side == "left" else slice(len(row))] = row
    return array


def share(first: int, second: int, room: int | None) -> tuple[int, int]:
    """How much of two texts of these lengths fits in `room`: the longer is cut first, then both to halves."""
    short, long = sorted((first, second))
    if room is not None and short + long > room:
        long = max(short, room - short)
        if short + long > room:
            short = room // 2
            long = room - short
    return (short, long) if first <= second else (long, short)


def check_limit(limit: int | None, added: int) -> None:
    """Raise `InputError` for a length that has no room for the `added` special tokens and one of text."""
    if limit is not None and limit <= added:
        raise InputError(f"length={limit} must be above {added}, the special tokens put around a text")
