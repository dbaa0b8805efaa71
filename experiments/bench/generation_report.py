"""Tables and files of a generation benchmark."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from statistics import median

from ...research.study.environment import describe_environment
from ...research.study.runs import write_atomically
from ...research.study.tables import Cell, Table
from .generation import Seen


def rates_table(seen: Seen) -> Table:
    """Tokens a second of prefill and decoding, beside the first entrant, and against the memory's rate."""
    rows: list[tuple[Cell, ...]] = [
        (
            key[1],
            key[0],
            key[1] * seen.job.prompt / seen.seconds(key, "first"),
            key[1] / seen.seconds(key, "token"),
            *(seen.advantage(key, what) for what in ("first", "token")),
            round(100 * seen.of_bound(key), 1),
        )
        for key in sorted(seen.rounds, key=lambda key: key[1])
    ]
    first = next(iter(seen.entrants))
    columns = (
        "batch",
        "generation",
        "prefill tokens/s",
        "decode tokens/s",
        f"prefill time / {first}",
        f"decode time / {first}",
        "% of the bound",
    )
    return Table(columns, tuple(rows), "Greedy generation, medians over the rounds")


def memory_table(seen: Seen) -> Table:
    """How fast a large matrix-vector product reads the memory, and what that allows."""
    rows: list[tuple[Cell, ...]] = [
        (label, median(rates) / 1e9, seen.entrants[label].weights / 1e6)
        for label, rates in seen.reads.items()
    ]
    columns = ("matrix times vector", "GB/s", "weights of a token, MB")
    return Table(columns, tuple(rows), "Reading a float32 matrix of 512 MiB, medians over the rounds")


def tables(seen: Seen) -> dict[str, Table]:
    """All tables by the names of their files."""
    return {"generation": rates_table(seen), "memory": memory_table(seen)}


def summary(seen: Seen) -> str:
    """What the run was and what came out, as Markdown."""
    job, (before, after) = seen.job, seen.load
    equal = "; ".join(f"batch {batch}: {100 * share:.1f} %" for batch, share in seen.equal.items())
    text = (
        f"Prompts of {job.prompt} random tokens, {job.new} more tokens decoded after the first, float32.\n"
        f"{'; '.join(f'{name}: {version}' for name, version in seen.versions.items())}.\n"
        f"{os.cpu_count()} processors; load {before:.1f} before, {after:.1f} after.\n"
        + (f"Equal tokens: {equal}.\n" if equal else "")
    )
    return text + "".join(f"\n{table.caption}:\n\n{table.markdown()}" for table in tables(seen).values())


def write(seen: Seen, folder: Path) -> None:
    """Write each table as CSV and Markdown, and every single timing with the environment as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables(seen).items():
        table.write(folder, name)
    record = {
        "entrants": {label: dataclasses.asdict(entrant) for label, entrant in seen.entrants.items()},
        "rounds": [
            {"label": label, "batch": batch, "rounds": rounds}
            for (label, batch), rounds in seen.rounds.items()
        ],
        "reads": seen.reads,
        "equal": seen.equal,
        "versions": seen.versions,
        "load": seen.load,
        "environment": describe_environment(),
    }
    write_atomically(folder / "generate.json", json.dumps(record, indent=1) + "\n")
