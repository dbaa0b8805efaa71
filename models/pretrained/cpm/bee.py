"""CPM-Bee's tokenizer: longest match, tokens in angle brackets, and names for what the vocabulary lacks.

A word that has no id gets one for the moment: the id of the token that its name begins with and a number that
tells it from others of that name (OpenBMB/CPM-Bee, `src/cpm_live/tokenizers/bee.py` and
`dataset/utils.py`). So `<ans_0>` and `<ans_1>` are both `<ans>`, numbers 0 and 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from .... import InputError
from ..tokenizers.interface import SpecialTokens, Tokenizer, check_limit
from .vocabulary import Vocabulary, longest_match

LONGEST = 32  # characters of a piece of plain text
UNKNOWN = "<unk>"


class Word(NamedTuple):
    """A token: the id of its row in the table, and its number among words of one name (0: the row itself)."""

    id: int
    sub: int = 0


class Piece(NamedTuple):
    """A part of a text: a token in brackets, or plain text that is one token, or none (`known`)."""

    text: str
    special: bool
    known: bool


@dataclass
class Names:
    """The words of one JSON that the vocabulary lacks, in the order of their appearance."""

    words: dict[tuple[str, bool], Word] = field(default_factory=dict)

    def word(self, piece: Piece, vocabulary: Vocabulary) -> Word:
        """The word of a piece that has no id; a new one is the next of its name."""
        key = (piece.text, piece.special)
        if key not in self.words:
            base = f"<{piece.text[1:-1].split('_')[0]}>" if piece.special else UNKNOWN
            if base not in vocabulary.ids:
                raise InputError(f"token {piece.text} is numbered of {base}, which the vocabulary lacks")
            number = vocabulary.ids[base]
            self.words[key] = Word(number, sum(word.id == number for word in self.words.values()))
        return self.words[key]

    def text(self, word: Word) -> str | None:
        """What stands for a word in the text, escaped; None for a word without a name of its own."""
        texts = (
            text if special else escape(text) for (text, special), own in self.words.items() if own == word
        )
        return next(texts, None)


class BeeTokenizer(Tokenizer):
    """Text to words and back, from `bee.txt`.

    In a text `<` begins a token in brackets, `<<` is the character itself.
    """

    def __init__(self, vocabulary: Vocabulary | str | Path) -> None:
        if not isinstance(vocabulary, Vocabulary):
            vocabulary = Vocabulary.read(vocabulary)
        self.vocabulary, ids = vocabulary, vocabulary.ids
        special = frozenset(ids[name] for name in vocabulary.special())
        self.tokens = SpecialTokens(ids["<pad>"], ids["<s>"], ids["</s>"], special)

    @property
    def vocab_size(self) -> int:
        """Rows of a model's table."""
        return self.vocabulary.size

    @cached_property
    def _plain(self) -> frozenset[str]:
        return frozenset(self.vocabulary.ids) - self.vocabulary.special()

    @cached_property
    def _strings(self) -> dict[int, str]:
        return self.vocabulary.strings()

    def pieces(self, text: str) -> list[Piece]:
        """The text's pieces; neighbouring plain text that has no token is one piece, brackets keep theirs."""
        pieces: list[Piece] = []
        for part, special in _parts(text):
            if special:
                pieces.append(Piece(part, True, part in self.vocabulary.ids))
                continue
            unknown = ""
            for piece, known in longest_match(part, self._plain, LONGEST):
                if known and unknown:
                    pieces.append(Piece(unknown, False, False))
                unknown = "" if known else unknown + piece
                pieces += [Piece(piece, False, True)] * known
            pieces += [Piece(unknown, False, False)] * bool(unknown)
        return pieces

    def words(self, text: str, names: Names) -> list[Word]:
        """The words of a text; those without an id enter `names`.

        Raises `InputError` for a `<` that nothing closes, and for a numbered token of an unknown name.
        """
        ids = self.vocabulary.ids
        return [
            Word(ids[piece.text]) if piece.known else names.word(piece, self.vocabulary)
            for piece in self.pieces(text)
        ]

    def text(self, words: Iterable[Word], names: Names) -> str:
        """The text of some words, the inverse of `words`."""
        return "".join(self._text(word, names) for word in words)

    def _text(self, word: Word, names: Names) -> str:
        named = names.text(word)
        if named is not None:
            return named
        if word.sub or word.id not in self._strings:
            raise InputError(f"no word has id {word.id} and number {word.sub}")
        string = self._strings[word.id]
        return string if word.id in self.tokens.all else escape(string)

    def encode_all(self, texts: Sequence[str], limit: int | None, special: bool) -> list[list[int]]:
        """The ids of each text, between `<s>` and `</s>` if `special`; numbers of one name are lost here."""
        check_limit(limit, 2 * special)
        rows = [[word.id for word in self.words(text, Names())] for text in texts]
        rows = [row[: None if limit is None else limit - 2 * special] for row in rows]
        ids = self.vocabulary.ids
        return [[ids["<s>"], *row, ids["</s>"]] if special else row for row in rows]

    def encode_pair(self, first: str, second: str, limit: int | None) -> tuple[list[int], list[int]]:
        """Raises `InputError`: CPM-Bee reads several texts as a task in JSON."""
        raise InputError("CPM-Bee has no form for pairs of texts; give them as keys of a task (cpm.encode)")

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of some ids, `<` escaped."""
        kept = (int(number) for number in ids if special or number not in self.tokens.all)
        return self.text(map(Word, kept), Names())


def escape(text: str) -> str:
    """Plain text as it is written beside tokens in brackets."""
    return text.replace("<", "<<")


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """(part, whether it is a token in brackets); plain parts with `<<` read as `<`."""
    plain, start = "", 0
    while start < len(text):
        if text[start] != "<":
            end = text.find("<", start)
            end = len(text) if end < 0 else end
            plain, start = plain + text[start:end], end
        elif text.startswith("<<", start):
            plain, start = plain + "<", start + 2
        else:
            end = text.find(">", start)
            if end < start + 2 or "<" in text[start + 1 : end]:
                found = text[start : start + 12]
                raise InputError(f"a token begins at {found!r}, but no > closes it; a plain < is written <<")
            if plain:
                yield plain, False
            yield text[start : end + 1], True
            plain, start = "", end + 1
    if plain:
        yield plain, False
