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
from .generation import LABELS, Seen


def rates_table(seen: Seen) -> Table:
    """Tokens a second of prefill and decoding, beside ours, and against the memory's rate."""
    compared = any(name == "ours" for name, _ in seen.rounds)
    rows: list[tuple[Cell, ...]] = []
    for key in sorted(seen.rounds, key=lambda key: (key[1], key[0])):
        name, batch = key
        ratios = [seen.advantage(key, what) if compared else None for what in ("first", "token")]
        rows.append(
            (
                batch,
                LABELS[name],
                batch * seen.job.prompt / seen.seconds(key, "first"),
                batch / seen.seconds(key, "token"),
                *ratios,
                round(100 * seen.of_bound(key), 1),
            )
        )
    columns = (
        "batch",
        "generation",
        "prefill tokens/s",
        "decode tokens/s",
        "prefill time / ours",
        "decode time / ours",
        "% of the bound",
    )
    return Table(columns, tuple(rows), "Greedy generation, medians over the rounds")


def memory_table(seen: Seen) -> Table:
    """How fast a large matrix-vector product reads the memory, and what that allows."""
    rows: list[tuple[Cell, ...]] = [
        (LABELS[name], median(rates) / 1e9, median(rates) / seen.weights)
        for name, rates in seen.reads.items()
    ]
    columns = ("matrix times vector", "GB/s", "steps/s if weights were all")
    return Table(columns, tuple(rows), "Reading a float32 matrix of 512 MiB, medians over the rounds")


def tables(seen: Seen) -> dict[str, Table]:
    """All tables by the names of their files."""
    return {"generation": rates_table(seen), "memory": memory_table(seen)}


def summary(seen: Seen) -> str:
    """What the run was and what came out, as Markdown."""
    job, (before, after) = seen.job, seen.load
    equal = "; ".join(f"batch {batch}: {100 * share:.1f} %" for batch, share in seen.equal.items())
    text = (
        f"Prompts of {job.prompt} random tokens, {job.new} more tokens decoded, float32; "
        f"{seen.weights / 1e6:.1f} MB of weights a token.\n"
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
        "job": dataclasses.asdict(seen.job),
        "weight_bytes": seen.weights,
        "rounds": [
            {"contender": name, "batch": batch, "rounds": r} for (name, batch), r in seen.rounds.items()
        ],
        "reads": seen.reads,
        "equal": seen.equal,
        "versions": seen.versions,
        "load": seen.load,
        "environment": describe_environment(),
    }
    write_atomically(folder / "generate.json", json.dumps(record, indent=1) + "\n")
