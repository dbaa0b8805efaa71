"""Classification examples: a text's tokens, its end token, and its label's id.

A row gives tokens, segments (1, and 0 for padding), positions and, where the model tells two texts apart,
token_types int32 [length], label int32 [] and weight float32 []: 1, or 0 in rows that only fill the last
evaluation batch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import InputError
from .padding import filled, token_fields
from .sources import Source
from .tokenizers import Tokenizer

__all__ = ["Examples", "Labels", "examples"]


@dataclass(frozen=True)
class Labels:
    """The labels of a task in the order of their ids."""

    names: tuple[Any, ...]

    @classmethod
    def of(cls, source: Source) -> "Labels":
        """The labels that `source`, the train split, has: numbers by value, names by the alphabet.

        A label feature of `datasets` with names keeps its own numbers and order.

        Raises:
            InputError: where there is only one label.
        """
        feature = source.rows.features[source.label_column or ""] if source.label_column else None
        named = getattr(feature, "names", None)
        names = tuple(range(len(named))) if named else tuple(sorted(set(source.labels())))
        if len(names) < 2:
            raise InputError(f"{source.name}: only one label ({names[0]!r}); two are needed to tell apart")
        return cls(names)

    def __len__(self) -> int:
        return len(self.names)

    def ids(self, labels: Iterable[Any], where: str) -> np.ndarray:
        """The ids of `labels`, int32; `where` names their file in the error for one that is not known."""
        known = {name: number for number, name in enumerate(self.names)}
        found = []
        for row, label in enumerate(labels, start=1):
            if label not in known:
                names = ", ".join(repr(name) for name in self.names[:20]) + (", …" if len(self) > 20 else "")
                raise InputError(
                    f"{where}: row {row}: the train split lacks label {label!r}; it has: {names}"
                )
            found.append(known[label])
        return np.asarray(found, np.int32)


@dataclass(frozen=True)
class Examples:
    """Encoded examples; `examples[i]` is one row's fields as numpy arrays.

    Attributes:
        ids: the tokens of each example, the end token included; at most `length`.
        labels: int32 [rows].
        length: T, what rows are padded to.
        pad: the token that fills them.
        types: the token types of each example, for a model that has them; rows have `token_types` then.
    """

    ids: Sequence[np.ndarray]
    labels: np.ndarray
    length: int
    pad: int = 0
    types: Sequence[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = token_fields(self.ids[index], self.length, self.pad) | {
            "label": np.asarray(self.labels[index], np.int32),
            "weight": np.ones((), np.float32),
        }
        if self.types is not None:
            row["token_types"] = filled(self.types[index], self.length, 0)
        return row


def examples(
    source: Source, tokenizer: Tokenizer, labels: Labels, length: int, *, truncate: bool = False
) -> Examples:
    """The rows of `source` as examples of at most `length` tokens.

    Args:
        source: with a label column.
        tokenizer: encodes the texts; its end token closes each, so that none is without tokens.
        labels: `Labels.of` the train split.
        length: T; the model's positions, or less.
        truncate: cut longer texts at their end; otherwise they are an error.

    Raises:
        InputError: for a text longer than `length`, or a label that the train split lacks.
    """
    numbers = labels.ids(source.labels(), source.name)
    ids = [np.append(each, np.int32(tokenizer.eos)) for each in tokenizer.encode(list(source.texts()))]
    longest = int(np.argmax([len(each) for each in ids]))
    if len(ids[longest]) > length and not truncate:
        raise InputError(
            f"{source.name}: row {longest + 1} has {len(ids[longest])} tokens, the longest allowed {length}; "
            "allow more, up to the model's positions, or truncate (--truncate)"
        )
    ids = [each if len(each) <= length else np.append(each[: length - 1], each[-1]) for each in ids]
    return Examples(ids, numbers, length, tokenizer.pad)
