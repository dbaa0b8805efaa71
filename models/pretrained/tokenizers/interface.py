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
        if side not in SIDES:
            raise InputError(f"side={side!r} is not one of {', '.join(SIDES)}")
        if not texts:
            raise InputError("texts is empty; a batch needs at least one")
        rows = self.encode_all(texts, length, special)
        width = length or max(1, *map(len, rows))
        tokens = np.full((len(rows), width), self.pad, np.int32)
        segments = np.zeros((len(rows), width), np.int32)
        for index, row in enumerate(rows):
            place = slice(width - len(row), width) if side == "left" else slice(len(row))
            tokens[index, place], segments[index, place] = row, 1
        return tokens, segments


def check_limit(limit: int | None, added: int) -> None:
    """Raise `InputError` for a length that has no room for the `added` special tokens and one of text."""
    if limit is not None and limit <= added:
        raise InputError(f"length={limit} must be above {added}, the special tokens put around a text")
