"""CPM-Ant's tokenizer: words by jieba, each cut by longest match (OpenBMB/CPM-Live, branch cpm-ant)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path

from .... import InputError
from ..tokenizers.interface import SpecialTokens, Tokenizer, check_limit
from .vocabulary import Vocabulary, longest_match

LONGEST_WORD = 200  # characters; a longer word is unknown as a whole
Split = Callable[[str], Iterable[str]]


class AntTokenizer(Tokenizer):
    """Chinese text to ids and back, from `ant.txt` (or `ant_plus.txt`).

    `words` cuts a text into words; by default it is jieba's exact mode. A text begins with `<s>`; what is
    not in the vocabulary is dropped, as where CPM-Ant generates, or with `keep_unknown` is `<unk>`.
    """

    def __init__(
        self, vocabulary: Vocabulary | str | Path, words: Split | None = None, keep_unknown: bool = False
    ) -> None:
        if not isinstance(vocabulary, Vocabulary):
            vocabulary = Vocabulary.read(vocabulary)
        self.vocabulary, self.keep_unknown, self._words = vocabulary, keep_unknown, words
        ids = vocabulary.ids
        special = frozenset(ids[name] for name in vocabulary.special())
        self.tokens = SpecialTokens(ids["<pad>"], ids["<s>"], ids["</s>"], special)

    @property
    def vocab_size(self) -> int:
        """Rows of a model's table without its prompts."""
        return self.vocabulary.size

    @cached_property
    def words(self) -> Split:
        """The function that cuts a text into words; raises `InputError` where jieba is not installed."""
        return self._words or _jieba()

    def pieces(self, text: str) -> list[str]:
        """The tokens of a text as strings, `<unk>` for what is not in the vocabulary."""
        pieces = []
        for word in self.words(text):
            if len(word) > LONGEST_WORD:
                pieces.append("<unk>")
                continue
            found = longest_match(word, self.vocabulary.ids, LONGEST_WORD)
            pieces += [piece if known else "<unk>" for piece, known in found]
        return pieces

    def encode_all(self, texts: Sequence[str], limit: int | None, special: bool) -> list[list[int]]:
        """The ids of each text, with `<s>` before it if `special`."""
        check_limit(limit, int(special))
        before = [self.vocabulary.ids["<s>"]] * special
        rows = []
        for text in texts:
            pieces = (piece for piece in self.pieces(text) if self.keep_unknown or piece != "<unk>")
            rows.append([*before, *(self.vocabulary.ids[piece] for piece in pieces)][:limit])
        return rows

    def encode_pair(self, first: str, second: str, limit: int | None) -> tuple[list[int], list[int]]:
        """Raises `InputError`: CPM-Ant reads no pairs of texts."""
        raise InputError("CPM-Ant has no form for pairs of texts; join them as one")

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The strings of the ids, one after another."""
        kept = (number for number in ids if special or number not in self.tokens.all)
        return "".join(self._strings.get(int(number), "<unk>") for number in kept)

    @cached_property
    def _strings(self) -> dict[int, str]:
        return self.vocabulary.strings()


def _jieba() -> Split:
    try:
        jieba = import_module("jieba")
    except ImportError as error:
        raise InputError("CPM-Ant's tokenizer cuts text into words with jieba: pip install jieba") from error
    return lambda text: jieba.cut(text, cut_all=False)
