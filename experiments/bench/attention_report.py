"""Tables and files of an attention benchmark."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from statistics import median

from ...research.study.environment import describe_environment
from ...research.study.runs import write_atomically
from ...research.study.tables import Cell, Table
from .attention import Seen, Timed

MIB = 1 << 20


def times_table(seen: Seen) -> Table:
    """A row a length and contender: time, processor time, rate and temporary memory of each pass."""
    passes = (False, True) if any(timed.backward for timed in seen.timed) else (False,)
    unit = "TFLOP/s" if max(timed.rate(seen.job) for timed in seen.timed) >= 1 else "GFLOP/s"
    quantities = {"ms": _wall, "CPU ms": _cpu, unit: _rate(seen, unit), "temp MiB": _temporary}
    columns = [f"{'f+b' if both else 'f'} {name}" for name in quantities for both in passes]
    by_key = {(timed.length, timed.contender, timed.backward): timed for timed in seen.timed}
    rows: list[tuple[Cell, ...]] = []
    for length, contender in dict.fromkeys(key[:2] for key in by_key):
        found = [by_key.get((length, contender, backward)) for backward in passes]
        cells = (
            cell(timed) if timed is not None else None for cell in quantities.values() for timed in found
        )
        rows.append((length, contender, *cells))
    return Table(("length", "attention", *columns), tuple(rows), "Medians over the rounds")


def _wall(timed: Timed) -> Cell:
    return round(1e3 * median(timed.wall), 4)


def _cpu(timed: Timed) -> Cell:
    return round(1e3 * median(timed.cpu), 4)


def _rate(seen: Seen, unit: str) -> Callable[[Timed], Cell]:
    scale = 1 if unit == "TFLOP/s" else 1e3
    return lambda timed: float(f"{scale * timed.rate(seen.job):.3g}")


def _temporary(timed: Timed) -> Cell:
    return None if timed.temporary is None else round(timed.temporary / MIB, 1)


def summary(seen: Seen) -> str:
    """What the run was and what came out, as Markdown."""
    job, (before, after) = seen.job, seen.load
    lengths = dict.fromkeys(timed.length for timed in seen.timed)
    live = ", ".join(f"{100 * job.live_fraction(length):.0f} % at {length}" for length in lengths)
    apart = max((timed.apart for timed in seen.timed), default=0.0)
    text = (
        f"B={job.batch} H={job.heads} G={job.kv_heads} K={job.width} {job.dtype}, mask {job.mask}, bias "
        f"{job.bias}; live tiles of 128 x 128: {live}.\n{'; '.join(seen.versions)}.\n"
        f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} processors; load {before:.1f} before, "
        f"{after:.1f} after. Outputs are at most {apart:.0e} apart. f: forward, f+b: and backward.\n"
    )
    text += "".join(f"Without {name}: {reason}.\n" for name, reason in seen.left_out.items())
    table = times_table(seen)
    return f"{text}\n{table.caption}:\n\n{table.markdown()}"


def write(seen: Seen, folder: Path) -> None:
    """Write the table as CSV and Markdown, and every single timing as lines of JSON, the first of the run."""
    folder.mkdir(parents=True, exist_ok=True)
    times_table(seen).write(folder, "attention")
    (folder / "summary.md").write_text(summary(seen) + "\n")
    run = {
        "job": dataclasses.asdict(seen.job),
        "versions": seen.versions,
        "left_out": seen.left_out,
        "load": seen.load,
        "environment": describe_environment(),
    }
    lines = [run, *(dataclasses.asdict(timed) | {"tflops": timed.rate(seen.job)} for timed in seen.timed)]
    write_atomically(folder / "attention.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
