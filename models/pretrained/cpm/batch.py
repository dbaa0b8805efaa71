"""Samples as the arrays of a batch: packed into rows for training, or one a row for answering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .... import InputError
from ... import ExtraWords, TreePositions
from ...kernels import Mask, Queries, Segments
from ..prepared import given_first
from .bee import BeeTokenizer, Word
from .sample import Sample, targets

PLACEHOLDER = Word(0, 1)  # a batch has at least one extra word, as in training upstream


@dataclass(frozen=True)
class Batch:
    """Rows of samples: `tokens`, `segments`, `context` and `targets` are `[B, T]`.

    `segments` number the samples of a row from 1 on, 0 is padding. `context` is what is given, `main` what
    belongs to a task and not to an example. `targets` are what each token is to predict, -100 where nothing;
    they count `extra` words from `vocab` on, as the logits do.
    """

    tokens: np.ndarray
    segments: np.ndarray
    positions: TreePositions
    context: np.ndarray
    main: np.ndarray
    targets: np.ndarray
    extra: ExtraWords

    @property
    def mask(self) -> Mask:
        """What is given is seen by all; examples see only themselves, tasks their examples too."""
        apart = Queries(self.main) | Segments(np.asarray(self.positions.group) + 1)
        return given_first(self.context) & apart

    @property
    def arguments(self) -> dict[str, Any]:
        """For `Transformer.apply` of a model with an `ExtendedHead`, beside the tokens."""
        given = {"segments": self.segments, "positions": self.positions, "mask": self.mask}
        return {**given, "extra": self.extra}


def pack(samples: Sequence[Sample], tokenizer: BeeTokenizer, length: int = 2048) -> Batch:
    """Samples packed into rows of `length` tokens, each into the fullest row that has room for it.

    Raises `InputError` for no samples and for one that is longer than a row.
    """
    rows: list[list[Sample]] = []
    for number, sample in enumerate(samples):
        if len(sample) > length:
            raise InputError(
                f"sample {number} has {len(sample)} tokens; length={length} must be at least that"
            )
        room = [length - sum(map(len, row)) for row in rows]
        fitting = [index for index, left in enumerate(room) if left >= len(sample)]
        if fitting:
            rows[min(fitting, key=room.__getitem__)].append(sample)
        else:
            rows.append([sample])
    return _batch(rows, tokenizer, length, left=False)


def left_padded(
    samples: Sequence[Sample], tokenizer: BeeTokenizer, length: int = 0, extra: int = 0, nodes: int = 0
) -> Batch:
    """A row for each sample, padded on the left: T is `length`, or that of the longest.

    There are at least `extra` extra words and room for `nodes` segments, so that batches may have one shape.
    """
    longest = max(map(len, samples), default=0)
    if length and longest > length:
        raise InputError(f"a sample has {longest} tokens; length={length} must be at least that")
    return _batch([[sample] for sample in samples], tokenizer, length or longest, True, extra, nodes)


def _batch(
    rows: list[list[Sample]],
    tokenizer: BeeTokenizer,
    length: int,
    left: bool,
    extra: int = 0,
    nodes: int = 0,
) -> Batch:
    if not rows:
        raise InputError("samples is empty; a batch needs at least one")
    samples = [sample for row in rows for sample in row]
    words = extra_words(samples)
    nodes = max([nodes, *(len(table) for sample in samples for table in sample.relations)])
    vocab, ids = tokenizer.vocab_size, tokenizer.vocabulary.ids
    columns: dict[str, list[np.ndarray]] = {}
    for row in rows:
        parts = [_columns(sample, number, nodes) for number, sample in enumerate(row)]
        for part, sample in zip(parts, row):
            part["targets"] = targets(sample, words, vocab, ids["<s>"], ids["</s>"])
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        # trees of different samples are different groups
        joined["group"] += joined["segments"] * (1 + joined["group"].max()) - 1
        joined["index"] = np.arange(length - len(joined["tokens"]) if left else 0, length)[
            : len(joined["tokens"])
        ]
        for name, values in joined.items():
            columns.setdefault(name, []).append(
                _filled(values, length, left, -100 if name == "targets" else 0)
            )
    arrays = {name: np.stack(values) for name, values in columns.items()}
    place = {name: arrays.pop(name) for name in ("index", "segment", "group", "relations", "sub")}
    table = [*words] + [PLACEHOLDER] * (max(extra, 1) - len(words))
    more = ExtraWords(*(np.array(values, np.int32) for values in zip(*table)))  # type: ignore[arg-type]
    return Batch(positions=TreePositions(**place), extra=more, **arrays)  # type: ignore[arg-type]


def extra_words(samples: Sequence[Sample]) -> dict[Word, int]:
    """The numbered words of some samples, other than the first of each name, and their places in a table."""
    table: dict[Word, int] = {}
    for sample in samples:
        for word in sample.names.words.values():
            if word.sub:
                table.setdefault(word, len(table))
    return table


def _columns(sample: Sample, number: int, nodes: int) -> dict[str, np.ndarray]:
    """The arrays `[n, ...]` of a sample that is the `number`-th of its row."""
    relations = np.zeros((len(sample), nodes), np.int32)
    for tree, table in enumerate(sample.relations):
        own = np.flatnonzero(sample.tree == tree)
        relations[own, : table.shape[1]] = table[sample.segment[own]]
    return {
        "tokens": sample.ids,
        "sub": sample.sub,
        "context": sample.context,
        "segment": sample.segment,
        "relations": relations,
        "group": sample.tree.copy(),
        "main": sample.tree == 0,
        "segments": np.full(len(sample), number + 1, np.int32),
    }


def _filled(values: np.ndarray, length: int, left: bool, value: int) -> np.ndarray:
    missing = length - len(values)
    widths = [(missing, 0) if left else (0, missing)] + [(0, 0)] * (values.ndim - 1)
    kind = np.bool_ if values.dtype == np.bool_ else np.int32
    return np.pad(values, widths, constant_values=value).astype(kind)
