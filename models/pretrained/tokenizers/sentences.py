"""Tokenizers in sentencepiece's own `.model` files (Kudo and Richardson, "SentencePiece", 2018)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .... import InputError
from .interface import SpecialTokens, Tokenizer, check_limit, share


@dataclass(frozen=True)
class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model, tokens added after its vocabulary, and what it puts around a text.

    `added` maps the texts of added and of control tokens to ids: where they occur in a text they are read
    as these tokens, and what stands between them is encoded by itself.
    """

    inner: Any
    tokens: SpecialTokens
    added: Mapping[str, int] = field(default_factory=dict)
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def vocab_size(self) -> int:
        """How many ids there are, added tokens included."""
        return max(self.inner.get_piece_size(), *(number + 1 for number in self.added.values()), 0)

    def encode_all(self, texts: Sequence[str], limit: int | None, special: bool) -> list[list[int]]:
        """The ids of each text; text is dropped at its end, special tokens stay."""
        before, after = (self.before, self.after) if special else ((), ())
        check_limit(limit, len(before) + len(after))
        room = None if limit is None else limit - len(before) - len(after)
        return [[*before, *self._body(text)[:room], *after] for text in texts]

    def encode_pair(self, first: str, second: str, limit: int | None) -> tuple[list[int], list[int]]:
        """The ids of two texts as one input, an end after each; the types are 0."""
        if not self.after:
            return super().encode_pair(first, second, limit)
        added = len(self.before) + 2 * len(self.after)
        check_limit(limit, added + 1)
        one, two = self._body(first), self._body(second)
        kept = share(len(one), len(two), None if limit is None else limit - added)
        ids = [*self.before, *one[: kept[0]], *self.after, *two[: kept[1]], *self.after]
        return ids, [0] * len(ids)

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of some ids; ids past the vocabulary decode to nothing."""
        kept = [int(each) for each in ids if special or int(each) not in self.tokens.all]
        names = {number: text for text, number in self.added.items()}
        pieces: list[str] = []
        run: list[int] = []
        for each in kept:
            if each in names:
                pieces += [self.inner.decode(run), names[each]]
                run = []
            elif each < self.inner.get_piece_size():
                run.append(each)
        return "".join([*pieces, self.inner.decode(run)])

    def _body(self, text: str) -> list[int]:
        if not self.added:
            return list(self.inner.encode(text))
        choices = sorted(self.added, key=len, reverse=True)
        ids: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, choices))})", text):
            ids += [self.added[part]] if part in self.added else self.inner.encode(part)
        return ids


def open_sentencepiece(path: Path) -> Any:
    """The `SentencePieceProcessor` of a file; `InputError` where the package or the file is no good."""
    try:
        import sentencepiece
    except ImportError as error:
        reason = "needs the package sentencepiece: pip install sentencepiece"
        raise InputError(f"{path}: {reason}") from error
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: not a sentencepiece model: {str(error).splitlines()[0]}") from error
