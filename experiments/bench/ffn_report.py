"""The table of `modicum bench ffn`, and whether its floors are met."""

from __future__ import annotations

from pathlib import Path

from ...research.study.tables import Cell, Table
from .ffn import DENSE, Seen
from .ffn_job import JOBS

FLOORS = {0.2: 1.5, 0.1: 3.0}  # of gather, with its router, for one token


def ffn_table(seen: Seen) -> Table:
    """A row for each width, batch, share and contender: time, and how many times faster than dense."""
    rows: list[tuple[Cell, ...]] = []
    for key in seen.times:
        name, batch, share, impl = key
        ms = round(seen.milliseconds(key) / JOBS[name].layers, 3)
        if impl == DENSE:
            rows.append((name, batch, "100%", DENSE, ms, None))
            continue
        middle, low, high = seen.gain(key)
        rows.append((name, batch, f"{share:.0%}", impl, ms, f"{middle:.2f} ({low:.2f}–{high:.2f})"))
    load = ", ".join(f"{each:.1f}" for each in seen.load)
    turns = len(next(iter(seen.times.values())))
    caption = (
        f"Milliseconds of one layer, router included, float32, and how many times faster than the dense "
        f"layer of the same turn: median (quartiles) of {turns} turns; load average before and after {load}."
    )
    columns = ("widths", "tokens", "neurons", "how", "ms a layer", "times faster")
    return Table(columns, tuple(rows), caption)


def floors(seen: Seen) -> str:
    """Whether gather reaches what is promised of one token."""
    lines = []
    for (name, batch, share, impl), _ in seen.times.items():
        if impl == "gather" and batch == 1 and share in FLOORS:
            middle = seen.gain((name, batch, share, impl))[0]
            word = "is met" if middle >= FLOORS[share] else "is not met"
            lines.append(f"{name}, {share:.0%}: the floor of {FLOORS[share]:g}× {word} ({middle:.2f}×)")
    return "\n".join(lines)


def summary(seen: Seen) -> str:
    """Everything as text."""
    table = ffn_table(seen)
    return f"{table.caption}\n\n{table.markdown()}\n{floors(seen)}"


def write(seen: Seen, folder: Path) -> None:
    """The table under `folder`."""
    ffn_table(seen).write(folder, "ffn")
