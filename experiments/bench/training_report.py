"""Tables and files of a training benchmark."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from ...research.study.environment import describe_environment
from ...research.study.runs import write_atomically
from ...research.study.tables import Cell, Table
from .job import DecoderJob
from .training import LABELS, Clock, Measurements

CLOCKS: tuple[Clock, ...] = get_args(Clock)


def steps_table(seen: Measurements) -> Table:
    """Rates and times of a step, and how many times as long as the first one's each takes."""
    first = "ours" if seen.first.startswith("ours") else LABELS[seen.first]
    rows: list[tuple[Cell, ...]] = [
        (
            LABELS[name],
            seen.job.tokens / seen.seconds(name, "wall"),
            *(seen.seconds(name, clock) for clock in CLOCKS),
            *(seen.advantage(name, clock) for clock in CLOCKS),
        )
        for name in seen.rounds
    ]
    compared = f"time / {first}, wall", f"time / {first}, CPU"
    columns = ("train step", "tokens/s", "wall s", "CPU s", *compared)
    return Table(columns, tuple(rows), "Train step, medians over the rounds")


def utilisation_table(seen: Measurements) -> Table:
    """The model's FLOP/s in per cent of the best matrix products seen on this machine."""
    best = {
        clock: [
            max(rate(library, clock) for library in seen.products)
            for rate in (seen.square_rate, seen.shapes_rate)
        ]
        for clock in CLOCKS
    }
    rows: list[tuple[Cell, ...]] = []
    for name in seen.rounds:
        rates = {clock: seen.flops / seen.seconds(name, clock) for clock in CLOCKS}
        shares = [100 * rates[clock] / rate for clock in CLOCKS for rate in best[clock]]
        rows.append((LABELS[name], rates["wall"] / 1e9, *(round(share, 1) for share in shares)))
    columns = ("model FLOPs", "GFLOP/s", "% of 2048³", "% of shapes", "CPU % of 2048³", "CPU % of shapes")
    return Table(columns, tuple(rows), "Model FLOPs against the machine's best float32 matrix products")


def products_table(seen: Measurements) -> Table:
    """The best matrix products of each library, in GFLOP a second and a CPU second."""
    rows: list[tuple[Cell, ...]] = [
        (
            library,
            *(
                rate(library, clock) / 1e9
                for clock in CLOCKS
                for rate in (seen.square_rate, seen.shapes_rate)
            ),
        )
        for library in seen.products
    ]
    columns = ("GFLOP/s", "2048³", "shapes", "2048³, by CPU s", "shapes, by CPU s")
    return Table(columns, tuple(rows), "Best float32 matrix products")


def tables(seen: Measurements) -> dict[str, Table]:
    """All tables by the names of their files."""
    return {
        "steps": steps_table(seen),
        "utilisation": utilisation_table(seen),
        "products": products_table(seen),
    }


def summary(seen: Measurements) -> str:
    """What the run was and what came out, as Markdown."""
    job = seen.job
    assert isinstance(job, DecoderJob)
    what = (
        f"{job.layers} layers, width {job.width}, {job.heads} heads, {job.length} tokens, batch {job.batch}, "
        f"vocabulary {job.vocab}, float32; {seen.flops / 1e9:.0f} GFLOP a step."
    )
    return described(seen, what, tables(seen))


def described(seen: Measurements, what: str, shown: Mapping[str, Table]) -> str:
    """The sentence `what`, who ran where, and the tables, as Markdown."""
    before, after = seen.load
    text = (
        f"{what}\n"
        f"{'; '.join(f'{name}: {version}' for name, version in seen.versions.items())}.\n"
        f"{os.cpu_count()} processors; load {before:.1f} before, {after:.1f} after.\n"
    )
    return text + "".join(f"\n{table.caption}:\n\n{table.markdown()}" for table in shown.values())


def write(seen: Measurements, folder: Path) -> None:
    """Write each table as CSV and Markdown, and every single timing with the environment as JSON."""
    write_all(seen, tables(seen), folder, "train.json")


def write_all(seen: Measurements, shown: Mapping[str, Table], folder: Path, name: str) -> None:
    """Write these tables, and all that was measured as the JSON file `name`."""
    folder.mkdir(parents=True, exist_ok=True)
    for title, table in shown.items():
        table.write(folder, title)
    products = {
        library: [{"sizes": list(sizes), **times} for sizes, times in found.items()]
        for library, found in seen.products.items()
    }
    record = {
        "job": json.loads(seen.job.to_json()),
        "model_flops_per_step": seen.flops,
        "rounds": seen.rounds,
        "losses": seen.losses,
        "memory": {name: dataclasses.asdict(memory) for name, memory in seen.memory.items()},
        "products": products,
        "versions": seen.versions,
        "load": seen.load,
        "environment": describe_environment(),
    }
    write_atomically(folder / name, json.dumps(record, indent=1) + "\n")
