"""Measure delta tuning of MiniLM beside PyTorch and PEFT: the same weights, rows, start and optimizer.

The rows are real texts, joined until they fill a row, so that nobody has padding to compute or to skip; a
row's label is that of its last text.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np

from ... import InputError
from ...models.pretrained import load_tokenizer
from ...models.pretrained.files import read_json
from ...models.pretrained.minilm import minilm_folder
from ...research.data.sources import load_source
from .training import Measurements, Report, check, measure_steps
from .tuning_job import TuningJob, TuningMethod

ContenderName = Literal["ours-tuning", "ours-tuning-wide", "peft", "peft-compiled"]
OURS = ("ours-tuning", "ours-tuning-wide")
BATCHES = 8  # taken in turn
CLOSE = 1e-4  # of the first steps' losses


@contextmanager
def tuning_job(
    data: Path, *, method: TuningMethod, batch: int, length: int, rank: int, checkpoint: Path | None = None
) -> Iterator[TuningJob]:
    """The job on a checkpoint of BERT's kind, by default MiniLM, with its rows in a temporary file.

    `data` is a file of lines of JSON with `text` and `label` (0 or 1). Raises `InputError` where it has too
    few texts, or the checkpoint too few positions.
    """
    check(batch=batch, length=length, rank=rank)
    folder = minilm_folder() if checkpoint is None else checkpoint
    sizes = read_json(folder / "config.json")
    if sizes.get("model_type") != "bert":
        raise InputError(f"{folder} holds model_type={sizes.get('model_type')!r}; 'bert' is what is measured")
    if length > sizes["max_position_embeddings"]:
        raise InputError(f"length={length} exceeds the model's {sizes['max_position_embeddings']} positions")
    tokens, labels = full_rows(data, folder, BATCHES * batch, length)
    with TemporaryDirectory(prefix="modicum-bench-") as temporary:
        rows = Path(temporary) / "rows.npz"
        np.savez(rows, tokens=tokens, labels=labels)
        yield TuningJob(
            str(folder),
            str(rows),
            sizes["num_hidden_layers"],
            sizes["hidden_size"],
            sizes["num_attention_heads"],
            sizes["intermediate_size"],
            method,
            batch,
            length,
            rank,
        )


def full_rows(data: Path, folder: Path, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[rows, length]` and labels `[rows]`, int32, of texts one after the other."""
    tokenizer, texts = load_tokenizer(folder), []
    tokens: list[list[int]] = []
    labels: list[int] = []
    for text, label in _examples(data):
        texts.append(text)
        row = tokenizer.encode_all([" ".join(texts)], length, special=True)[0]
        if len(row) == length:
            tokens.append(row)
            labels.append(label)
            texts = []
        if len(tokens) == rows:
            return np.asarray(tokens, np.int32), np.asarray(labels, np.int32)
    raise InputError(f"{data} fills {len(tokens)} rows of {length} tokens; {rows} are needed")


def _examples(data: Path) -> Iterator[tuple[str, int]]:
    source = load_source(data, label_column="label")
    for number, (text, label) in enumerate(zip(source.texts(), source.labels()), start=1):
        if label not in (0, 1):
            raise InputError(f"{data}: row {number} has label {label!r}; 0 and 1 are valid")
        yield text, label


def measure_tuning(
    job: TuningJob,
    *,
    rounds: int,
    steps: int,
    contenders: Sequence[ContenderName],
    threads: int = 0,
    report: Report = print,
) -> Measurements:
    """Let the contenders take turns, and check that they train the same model in the same way.

    Raises `InputError` where PEFT is needed and absent, and RuntimeError where losses of the first steps,
    which all start at the same numbers, differ.
    """
    check(rounds=rounds, steps=steps, contenders=len(contenders))
    require_peers(contenders)
    seen = measure_steps(
        job, job.flops, rounds=rounds, steps=steps, contenders=contenders, threads=threads, report=report
    )
    if (gap := greatest_gap(seen)) > CLOSE:
        raise RuntimeError(f"losses of the first steps differ by {gap:.1e}: {seen.losses}")
    return seen


def greatest_gap(seen: Measurements) -> float:
    """The greatest difference of two contenders' losses at one of the first steps."""
    return max(max(step) - min(step) for step in zip(*seen.losses.values()))


def require_peers(contenders: Sequence[str]) -> None:
    """Raise `InputError` where a contender needs PEFT and it is not installed."""
    missing = [name for name in ("torch", "peft", "transformers") if importlib.util.find_spec(name) is None]
    if missing and set(contenders) - set(OURS):
        raise InputError(f"{missing[0]} is not installed; pip install 'modicum[peers]'")
