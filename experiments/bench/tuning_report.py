"""Tables and files of a tuning benchmark."""

from __future__ import annotations

from pathlib import Path

from ...research.study.tables import Cell, Table
from . import training_report
from .training import LABELS, Measurements
from .tuning import greatest_gap
from .tuning_job import TuningJob

MIB = 1 << 20


def memory_table(seen: Measurements) -> Table:
    """What each process had in memory at most, and how much of it came after loading."""
    rows: list[tuple[Cell, ...]] = [
        (
            LABELS[name],
            *(
                round(size / MIB)
                for size in (memory.loaded, memory.starting, memory.stepping, memory.stepping - memory.loaded)
            ),
        )
        for name, memory in seen.memory.items()
    ]
    columns = ("resident MiB", "loaded", "at most until warm", "at most in a step", "above loaded")
    return Table(columns, tuple(rows), "Memory of the process")


def losses_table(seen: Measurements) -> Table:
    """The losses of the first steps, which must be equal."""
    count = len(next(iter(seen.losses.values())))
    rows: list[tuple[Cell, ...]] = [
        (LABELS[name], *(f"{loss:.6f}" for loss in losses)) for name, losses in seen.losses.items()
    ]
    columns = ("loss", *(f"step {index + 1}" for index in range(count)))
    return Table(columns, tuple(rows), f"Losses of the first steps, at most {greatest_gap(seen):.0e} apart")


def tables(seen: Measurements) -> dict[str, Table]:
    """All tables by the names of their files."""
    return {**training_report.tables(seen), "memory": memory_table(seen), "losses": losses_table(seen)}


def summary(seen: Measurements) -> str:
    """What the run was and what came out, as Markdown."""
    job = seen.job
    assert isinstance(job, TuningJob)
    how = f"LoRA of rank {job.rank} on query and value" if job.method == "lora" else f"{job.method} tuning"
    what = (
        f"{how}, {job.layers} layers, width {job.width}, {job.heads} heads, {job.length} tokens, "
        f"batch {job.batch}, float32; {seen.flops / 1e9:.0f} GFLOP a step."
    )
    return training_report.described(seen, what, tables(seen))


def write(seen: Measurements, folder: Path) -> None:
    """Write each table as CSV and Markdown, and every single timing with the environment as JSON."""
    training_report.write_all(seen, tables(seen), folder, "tune.json")
