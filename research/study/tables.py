"""Tables of results: mean ± standard deviation over seeds, as Markdown for people and CSV for programs."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from .runs import write_atomically

MISSING = "–"


@dataclass(frozen=True)
class Measured:
    """One quantity over repeated runs: mean, sample standard deviation (None for a single run), number.

    `runs` is how many runs should have given it; where fewer did, the text says how many.
    """

    mean: float
    deviation: float | None
    count: int
    runs: int

    @classmethod
    def of(cls, values: Sequence[float], runs: int | None = None) -> Self:
        """Summarise the values (at least one) that `runs` runs gave."""
        deviation = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
        return cls(statistics.fmean(values), deviation, len(values), len(values) if runs is None else runs)

    def __str__(self) -> str:
        number = format_number(self.mean)
        text = number if self.deviation is None else format_spread(self.mean, self.deviation)
        return text if self.count == self.runs else f"{text} (n={self.count})"


Cell = str | int | float | bool | Measured | None


@dataclass(frozen=True)
class Table:
    """Column names and rows of cells; None is a missing cell."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""

    def formatted(self) -> list[list[str]]:
        """The cells as people read them; a missing one is a dash."""
        return [[format_cell(cell) for cell in row] for row in self.rows]

    def numeric(self) -> list[bool]:
        """For each column, whether it holds numbers (and is therefore set flush right)."""
        columns = zip(*self.rows) if self.rows else ([None] for _ in self.columns)
        return [_is_numeric(list(column)) for column in columns]

    def markdown(self) -> str:
        """A Markdown table with aligned columns, ending in a newline."""
        body = [[cell.replace("|", "\\|") for cell in row] for row in self.formatted()]
        widths = [max(map(len, column)) for column in zip(self.columns, *body)]
        widths = [max(width, 4) for width in widths]
        rules = ["-" * (w - 1) + ":" if right else "-" * w for w, right in zip(widths, self.numeric())]
        lines = [_line(self.columns, widths, self.numeric()), _line(rules, widths, self.numeric())]
        return "\n".join(lines + [_line(row, widths, self.numeric()) for row in body]) + "\n"

    def csv(self) -> str:
        """CSV at full precision: a measured column becomes three (mean, sd, n); a missing cell is empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        measured = [any(isinstance(row[i], Measured) for row in self.rows) for i in range(len(self.columns))]
        names = ([f"{c} mean", f"{c} sd", f"{c} n"] if m else [c] for c, m in zip(self.columns, measured))
        writer.writerow([name for group in names for name in group])
        for row in self.rows:
            writer.writerow([value for cell, m in zip(row, measured) for value in _csv_values(cell, m)])
        return text.getvalue()

    def write(self, folder: Path, name: str) -> None:
        """Write `name.csv` and `name.md` into the folder."""
        write_atomically(folder / f"{name}.csv", self.csv())
        write_atomically(folder / f"{name}.md", self.markdown())


def summarise(
    results: Sequence[Mapping[str, Any]],
    by: Sequence[str],
    values: Sequence[str],
    caption: str = "",
) -> Table:
    """One row for each combination of the fields `by`, in order of first appearance, averaged over the rest.

    `results` has one mapping a run. The last column counts the runs; a measured cell to which fewer runs
    contributed says so.
    """
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault(tuple(repr(result.get(name)) for name in by), []).append(result)
    rows = [
        (*(group[0].get(name) for name in by), *(_measure(group, name) for name in values), len(group))
        for group in groups.values()
    ]
    return Table((*by, *values, "runs"), tuple(rows), caption)


def format_cell(cell: Cell) -> str:
    """A cell as people read it."""
    if cell is None or cell == "":
        return MISSING
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return format_number(cell) if isinstance(cell, int | float) else str(cell)


def format_number(value: float) -> str:
    """Four significant digits, whole numbers in full with separators: 0.8125, 124,439,808, 3.2e-05."""
    if not math.isfinite(value):
        return str(value)
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def format_spread(mean: float, deviation: float) -> str:
    """Mean ± deviation, both cut at the deviation's second significant digit: 0.812 ± 0.021."""
    if deviation == 0 or not math.isfinite(deviation):
        return f"{format_number(mean)} ± {format_number(deviation)}"
    decimals = 1 - math.floor(math.log10(deviation))
    if decimals > 6:
        return f"{mean:.3g} ± {deviation:.1e}"
    places = max(decimals, 0)
    return f"{round(mean, decimals):,.{places}f} ± {round(deviation, decimals):,.{places}f}"


def _measure(group: Sequence[Mapping[str, Any]], name: str) -> Cell:
    """The group's values of one name: summarised where they are numbers, kept where all are the same text."""
    found = [result[name] for result in group if result.get(name) is not None]
    if not found:
        return None
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in found):
        return Measured.of([float(value) for value in found], len(group))
    return found[0] if all(value == found[0] for value in found) else None


def _is_numeric(cells: Sequence[Cell]) -> bool:
    present = [cell for cell in cells if cell is not None]
    return bool(present) and all(isinstance(c, int | float | Measured) and c is not True for c in present)


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    padded = (c.rjust(width) if r else c.ljust(width) for c, width, r in zip(cells, widths, right))
    return "| " + " | ".join(padded) + " |"


def _csv_values(cell: Cell, measured: bool) -> list[Any]:
    if not measured:
        return ["" if cell is None else cell]
    if not isinstance(cell, Measured):
        return ["" if cell is None else cell, "", ""]
    return [cell.mean, "" if cell.deviation is None else cell.deviation, cell.count]
