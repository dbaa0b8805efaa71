"""ChatGLM-6B's tokenizer: a sentencepiece model that has tokens for line breaks, tabs and runs of spaces."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .... import InputError
from .interface import SpecialTokens, Tokenizer, check_limit
from .sentences import open_sentencepiece

FILE = "ice_text.model"
LONGEST_RUN = 80  # spaces that one token stands for
SPECIAL = (
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<unused_0>",
    "<ENC>",
    "<dBLOCK>",
    "<pad>",
    "</s>",
)


@dataclass(frozen=True)
class ChatGLMTokenizer(Tokenizer):
    """Text to ids and back; a prompt ends with [gMASK] and <sop>, a text with <eop>.

    Ids begin at `offset`, after the image tokens of the first release (20,000; 0 in the later one). A special
    token in a text is read as such.
    """

    inner: Any
    tokens: SpecialTokens
    offset: int = 0

    @classmethod
    def read(cls, path: str | Path, offset: int = 0) -> ChatGLMTokenizer:
        """The tokenizer in an `ice_text.model`; raises `InputError` where that lacks its special tokens."""
        inner = open_sentencepiece(Path(path))
        ids = {name: inner.piece_to_id(name) for name in SPECIAL}
        there = {name: number for name, number in ids.items() if inner.id_to_piece(number) == name}
        missing = [name for name in ("[MASK]", "[gMASK]", "<sop>", "<eop>") if name not in there]
        if missing:
            raise InputError(f"{path} has no {', '.join(missing)}: it is not ChatGLM-6B's {FILE}")
        numbers = {name: number + offset for name, number in there.items()}
        pad = numbers.get("<pad>", numbers["<eop>"])
        special = SpecialTokens(pad, numbers["<sop>"], numbers["<eop>"], frozenset(numbers.values()))
        return cls(inner, special, offset)

    @property
    def vocab_size(self) -> int:
        """How many ids there are, image tokens included."""
        return int(self.inner.get_piece_size()) + self.offset

    def number(self, name: str) -> int:
        """The id of a token by its text, `[gMASK]` say."""
        return int(self.inner.piece_to_id(name)) + self.offset

    def encode_all(self, texts: Sequence[str], limit: int | None, special: bool) -> list[list[int]]:
        """The ids of each text; `special` ends those without a mask with [gMASK], and all with <sop>."""
        check_limit(limit, 2 * special)
        masks = {self.number("[MASK]"), self.number("[gMASK]")}
        rows = []
        for text in texts:
            ids = [number + self.offset for number in self.inner.encode(written(text))]
            after = [self.number("<sop>")] * special
            after = [self.number("[gMASK]")] * (special and not masks & set(ids)) + after
            rows.append(ids[: None if limit is None else limit - len(after)] + after)
        return rows

    def encode_pair(self, first: str, second: str, limit: int | None) -> tuple[list[int], list[int]]:
        """Raises `InputError`: ChatGLM reads no pairs of texts."""
        raise InputError("ChatGLM has no form for pairs of texts; join them as one")

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of some ids; image tokens are none."""
        kept = (int(each) for each in ids if special or int(each) not in self.tokens.all)
        return read_back(self.inner.decode([each - self.offset for each in kept if each >= self.offset]))


def written(text: str) -> str:
    """A text with the tokens that stand for line breaks, tabs and runs of 2 to 80 spaces."""
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    return re.sub(f" {{2,{LONGEST_RUN}}}", lambda found: f"<|blank_{len(found[0])}|>", text)


def read_back(text: str) -> str:
    """The inverse of `written`."""
    text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
    return re.sub(r"<\|blank_(\d+)\|>", lambda found: " " * int(found[1]), text)
