"""GoEmotions as 27 questions, each of one emotion against the others, and the groups of emotions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from .. import InputError
from ..models.pretrained.tokenizers import Tokenizer
from ..research.data.encoded import encode_examples
from ..research.data.examples import Examples, Labels
from ..research.data.parts import Part
from ..research.data.sources import load_source
from .delta_tasks import Task, TaskRows

SPLITS = ("train", "dev", "test")


class Rows(Protocol):
    """What of a study's size says how many texts a task has."""

    @property
    def length(self) -> int:
        """Tokens of a text."""

    @property
    def dev_rows(self) -> int:
        """Texts of dev."""

    @property
    def test_rows(self) -> int:
        """Texts of test."""


@dataclass(frozen=True)
class Emotions:
    """Encoded texts of each split with their emotion's number, the emotions' names and their groups."""

    names: tuple[str, ...]
    splits: Mapping[str, Examples]
    groups: Mapping[str, str]
    fingerprint: str

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer, length: int) -> Emotions:
        """The data in `folder`; texts are cut to `length` tokens.

        Raises `InputError` where the folder, a split or the groups are missing, or an emotion has no group.
        """
        path = folder / "ekman_mapping.json"
        if not path.is_file():
            raise InputError(f"{path}: no such file; --data names the folder that holds goemotions")
        sources = {split: load_source(folder, split, "text", "label_text") for split in SPLITS}
        labels = Labels.of(sources["train"])
        groups = {name: group for group, names in json.loads(path.read_text()).items() for name in names}
        if missing := [name for name in labels.names if name not in groups]:
            raise InputError(f"{path}: {missing[0]!r} is in no group")
        encoded = {
            split: encode_examples(source, tokenizer, labels, length, truncate=True)
            for split, source in sources.items()
        }
        digest = "-".join(source.fingerprint for source in sources.values())
        return cls(labels.names, encoded, groups, digest)

    def ordered(self, wanted: Sequence[str] = ()) -> tuple[str, ...]:
        """The emotions `wanted` (none: all), those of one group beside each other, large groups first."""
        if unknown := [name for name in wanted if name not in self.names]:
            raise InputError(f"emotions: {unknown[0]!r} is unknown; valid: {', '.join(self.names)}")
        chosen = list(wanted or self.names)
        sizes = {group: sum(self.groups[name] == group for name in chosen) for group in self.groups.values()}
        return tuple(sorted(chosen, key=lambda name: (-sizes[self.groups[name]], self.groups[name], name)))

    def count(self, split: str, emotion: str) -> int:
        """How many texts of an emotion a split has."""
        return int((self.splits[split].labels == self.names.index(emotion)).sum())

    def task(self, emotion: str, size: Rows) -> TaskRows:
        """The question "this emotion or another" (label 1 or 0); training texts of the emotion are all."""
        return TaskRows(
            Task(emotion, size.length),
            self.balanced("train", emotion, 0),
            self.balanced("dev", emotion, size.dev_rows),
            self.balanced("test", emotion, size.test_rows),
            (0, 1),
            self.fingerprint,
        )

    def balanced(self, split: str, emotion: str, count: int) -> Part:
        """At most `count` texts (0: no limit) of a task in random order, half of them of the emotion."""
        number, examples = self.names.index(emotion), self.splits[split]
        draw = np.random.default_rng([SPLITS.index(split), number])
        mine = draw.permutation(np.flatnonzero(examples.labels == number))
        others = draw.permutation(np.flatnonzero(examples.labels != number))
        half = min(len(mine), len(others), count // 2 or len(mine))
        chosen = draw.permutation(np.concatenate([mine[:half], others[:half]]))
        binary = replace(examples, labels=(examples.labels == number).astype(np.int32))
        return Part(binary, chosen.tolist())

    def of(self, split: str, emotion: str, count: int) -> Part:
        """At most `count` texts of one emotion, drawn with a fixed seed."""
        number, examples = self.names.index(emotion), self.splits[split]
        mine = np.random.default_rng(number).permutation(np.flatnonzero(examples.labels == number))
        return Part(examples, mine[:count].tolist())

    def spread(self, split: str, count: int) -> Part:
        """`count` texts, of every emotion in turn."""
        each = [self.of(split, name, count).numbers for name in self.names]
        in_turn = [numbers[rank] for rank in range(count) for numbers in each if rank < len(numbers)]
        return Part(self.splits[split], in_turn[:count])
