"""A vocabulary of strings, and the greedy longest match that cuts a text into them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .... import InputError

# How the files write what would end or vanish from a line.
WRITTEN = {"</n>": "\n", "</_>": " "}


@dataclass(frozen=True)
class Vocabulary:
    """Strings and their ids, from a file with one string a line (`ant.txt`, `bee.txt`)."""

    ids: Mapping[str, int]

    @classmethod
    def read(cls, path: str | Path) -> Vocabulary:
        """Line n, counted from 0, has the id n; `</n>` is a new line and `</_>` a space."""
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path}: no such file; a vocabulary with one token a line is needed")
        lines = path.read_text("utf-8").removesuffix("\n").split("\n")
        return cls({WRITTEN.get(line, line): number for number, line in enumerate(lines)})

    def __post_init__(self) -> None:
        for name in ("<unk>", "<s>", "</s>", "<pad>"):
            if name not in self.ids:
                raise InputError(f"the vocabulary of {len(self.ids)} tokens has no {name!r}, which it needs")

    @property
    def size(self) -> int:
        """One more than the largest id: the rows of a model's table."""
        return max(self.ids.values()) + 1

    def strings(self) -> dict[int, str]:
        """Ids to strings."""
        return {number: text for text, number in self.ids.items()}

    def special(self) -> frozenset[str]:
        """The tokens in angle brackets."""
        return frozenset(text for text in self.ids if len(text) > 2 and text[0] == "<" and text[-1] == ">")


def longest_match(text: str, words: Collection[str], limit: int) -> Iterator[tuple[str, bool]]:
    """(piece, whether it is one of `words`) from left to right, the longest of at most `limit` characters.

    A character with which no word begins is a piece of its own.
    """
    start = 0
    while start < len(text):
        ends = range(min(len(text), start + limit), start, -1)
        end = next((end for end in ends if text[start:end] in words), 0)
        yield text[start : end or start + 1], bool(end)
        start = end or start + 1
