"""The data sets of the study of delta methods, as examples for a published encoder.

They are read from a folder beside the checkout (`../shared/data`), one folder a data set. Where there is no
official dev split, or no labelled test split, one is cut off the train split with a fixed seed: rates are
chosen on dev, and what is reported is measured on test, which nothing was chosen on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import InputError
from ..models.pretrained.tokenizers import Tokenizer
from ..research.data.encoded import encode_examples
from ..research.data.examples import Labels
from ..research.data.parts import Part
from ..research.data.sources import load_source
from ..research.training.trials import Scores


@dataclass(frozen=True)
class Task:
    """A data set: its columns, T tokens a row, and how it is measured.

    `test` and `dev` are splits of the folder; a dev split of "" is cut off the train split.
    """

    name: str
    length: int
    text: str = "text"
    pair: str = ""
    dev: str = "dev"
    test: str = "test"
    metric: str = "accuracy"


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("sst2", 32),
        Task("trec", 24, dev=""),
        Task("rte", 96, "sentence1", "sentence2", dev="", test="dev"),
        Task("subj", 48),
        Task("mrpc", 80, "sentence1", "sentence2"),
        Task("cola", 24, metric="mcc"),
        Task("tweeteval_emotion", 40),
    )
}


@dataclass(frozen=True)
class TaskRows:
    """A task's encoded splits; rows longer than the task's length are cut."""

    task: Task
    train: Part
    dev: Part
    test: Part
    labels: tuple[Any, ...]
    fingerprint: str

    def few(self, count: int, seed: int) -> Part:
        """`count` training rows, as equally many of each label as can be, drawn by `seed`."""
        draw = np.random.default_rng(seed)
        labels = np.asarray(self.train.rows.labels)[list(self.train.numbers)]  # type: ignore[attr-defined]
        order = draw.permutation(len(labels))
        rank = np.zeros(len(labels), int)
        for label in np.unique(labels):
            mine = order[labels[order] == label]
            rank[mine] = np.arange(len(mine))
        chosen = order[np.argsort(rank[order], kind="stable")][:count]
        return Part(self.train.rows, [self.train.numbers[int(index)] for index in chosen])


def load_task(folder: Path, task: Task, tokenizer: Tokenizer, *, dev_rows: int, test_rows: int) -> TaskRows:
    """The task in `folder`; at most so many rows of dev and test, at equal distances (0: all).

    Raises `InputError` where the folder or a split is missing.
    """
    if not (folder / task.name).is_dir():
        raise InputError(f"{folder / task.name}: no such data set; --data names the folder that holds it")
    splits = {"train": "train", "test": task.test, **({"dev": task.dev} if task.dev else {})}
    sources = {
        split: load_source(folder / task.name, name, task.text, "label") for split, name in splits.items()
    }
    labels = Labels.of(sources["train"])
    rows = {
        split: encode_examples(
            source, tokenizer, labels, task.length, pair_column=task.pair or None, truncate=True
        )
        for split, source in sources.items()
    }
    whole = rows["train"]
    numbers = np.random.default_rng(0).permutation(len(whole)).tolist()
    if task.dev:
        train, dev = Part(whole, numbers), Part(rows["dev"], _spread(len(rows["dev"]), dev_rows))
    else:
        count = min(dev_rows or len(whole) // 10, len(whole) // 4)
        train, dev = Part(whole, numbers[count:]), Part(whole, numbers[:count])
    test = Part(rows["test"], _spread(len(rows["test"]), test_rows))
    digest = "-".join(source.fingerprint for source in sources.values())
    return TaskRows(task, train, dev, test, labels.names, digest)


def measured(task: Task, scores: Scores, rows: Part) -> dict[str, float]:
    """`accuracy`, `loss` and, where the task is measured by it, `mcc` of scores on `rows`."""
    truth = np.asarray([rows[index]["label"] for index in range(len(rows))])
    result = {
        "accuracy": float(np.mean(scores.chosen == truth)),
        "loss": float(np.mean(scores.losses, dtype=np.float64)),
    }
    if task.metric == "mcc":
        result["mcc"] = matthews_correlation(scores.chosen, truth)
    return result


def matthews_correlation(chosen: np.ndarray, truth: np.ndarray) -> float:
    """Matthews' correlation of two labels, in [-1, 1]; 0 where one of them is constant (Matthews, 1975)."""
    a, b = chosen - chosen.mean(), truth - truth.mean()
    size = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / size if size else 0.0


def _spread(count: int, wanted: int) -> range:
    return range(count) if not wanted else range(0, count, max(1, count // wanted))[:wanted]
