"""The tables of the study of delta methods, and what they say of the claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..research.study.runs import write_atomically
from ..research.study.tables import Cell, Measured, Table

Results = Sequence[Mapping[str, Any]]

FULL, PROBE = "full tuning", "linear probe"
# Ding et al., 2023 (arXiv 2203.06904), averages over tasks, T5-base.
ORDER = (FULL, "LoRA", "adapter", "prefix", "soft prompt")


def write_methods(folder: Path, results: Results, times: Mapping[str, float], page: Path | None) -> str:
    """Write a table a task as CSV and Markdown under `folder`, all of them into `page`; return the text."""
    parts = []
    for name in dict.fromkeys(result["task"] for result in results):
        mine = [result for result in results if result["task"] == name]
        table = method_table(mine, times)
        table.write(folder / "tables", name)
        parts.append(f"## {name}\n\n{table.caption}\n\n{table.markdown()}\n{verdicts(mine)}")
    return _write("\n".join(parts), page)


def write_few(folder: Path, results: Results, page: Path | None) -> str:
    """The same for the cells on few examples: a row a method, a column a number of examples."""
    parts = []
    for name in dict.fromkeys(result["task"] for result in results):
        table = few_table([result for result in results if result["task"] == name])
        table.write(folder / "tables", f"{name}-few")
        parts.append(f"## {name}, few examples\n\n{table.caption}\n\n{table.markdown()}")
    return _write("\n".join(parts), page)


def method_table(results: Results, times: Mapping[str, float]) -> Table:
    """A row a method: what it tunes, how good it is, what it costs. `times` are milliseconds a step."""
    metric = results[0]["metric"]
    rows = []
    for method, runs in by_method(results).items():
        first = runs[0]
        rate = f"{first['rate']:g}{'*' if first['edge'] else ''}"
        cells: tuple[Cell, ...] = (
            method,
            round(100 * first["tuned_parameters"] / first["parameters"], 3),
            Measured.of([100 * run[f"test_{metric}"] for run in runs]),
            rate,
            first["stored_bytes"],
            round(first["memory"] / 2**20, 1) if "memory" in first else None,
            round(times[method], 1) if method in times else None,
        )
        rows.append(cells)
    unit = "Matthews' correlation × 100" if metric == "mcc" else "accuracy %"
    columns = ("method", "tuned %", f"test {unit}", "rate", "stored bytes", "step MiB", "step ms")
    seeds = max(len(runs) for runs in by_method(results).values())
    caption = (
        f"Mean ± s.d. of {seeds} seeds; * the rate is at the edge of its window; tuned % and stored bytes "
        f"include the classifier; step MiB is XLA's account of the compiled step."
    )
    return Table(columns, tuple(rows), caption)


def few_table(results: Results) -> Table:
    """A row a method, a column a number of examples."""
    metric = results[0]["metric"]
    counts = sorted({result["examples"] for result in results})
    rows: list[tuple[Cell, ...]] = []
    for method, runs in by_method(results).items():
        values = [
            [100 * run[f"test_{metric}"] for run in runs if run["examples"] == count] for count in counts
        ]
        rows.append((method, *(Measured.of(found) if found else None for found in values)))
    seeds = len({result["seed"] for result in results})
    caption = (
        f"Test {metric} × 100, mean ± s.d. of {seeds} seeds, which draw the examples, too. Rates are chosen "
        f"on the dev split, which has more labels than there are examples."
    )
    return Table(("method", *(f"{count} examples" for count in counts)), tuple(rows), caption)


def by_method(results: Results) -> dict[str, list[Mapping[str, Any]]]:
    """Results by method, in order of appearance."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["method"], []).append(result)
    return groups


def verdicts(results: Results) -> str:
    """Sentences on the two claims, with their figures, as a Markdown list."""
    metric = results[0]["metric"]
    groups = by_method(results)
    values = {method: [100 * run[f"test_{metric}"] for run in runs] for method, runs in groups.items()}
    share = {method: runs[0]["tuned_parameters"] / runs[0]["parameters"] for method, runs in groups.items()}
    small = [method for method in values if share[method] < 0.01 and method not in (FULL, PROBE)]
    lines = []
    if FULL in values and small:
        # Chosen on dev: the best of many on test would be best by luck as well.
        best = max(small, key=lambda method: fmean(run[f"dev_{metric}"] for run in groups[method]))
        gap, spread = fmean(values[best]) - fmean(values[FULL]), _spread(values[best], values[FULL])
        word = "holds" if gap >= -spread else "does not hold"
        lines.append(
            f"Under 1% ≈ full tuning {word} here: {best} ({share[best]:.2%}; on dev the best of them) is "
            f"{gap:+.1f} points from full tuning; the two spreads together are {spread:.1f}."
        )
    present = [method for method in ORDER if method in values]
    pairs = [_comparison(one, other, values) for one, other in pairwise(present)]
    if pairs:
        lines.append(f"The literature's order, pair by pair: {'; '.join(pairs)}.")
    return "".join(f"* {line}\n" for line in lines)


def _comparison(one: str, other: str, values: Mapping[str, Sequence[float]]) -> str:
    gap, spread = fmean(values[one]) - fmean(values[other]), _spread(values[one], values[other])
    word = "holds" if gap > spread else "is reversed" if gap < -spread else "is within the spread"
    return f"{one} > {other} {word} ({gap:+.1f} ± {spread:.1f})"


def _spread(one: Sequence[float], other: Sequence[float]) -> float:
    """Standard deviation of the difference of the two means' single runs; 0 where there is one run each."""
    return sum(stdev(values) ** 2 for values in (one, other) if len(values) > 1) ** 0.5


def _write(text: str, page: Path | None) -> str:
    if page is not None:
        write_atomically(page, text)
    return text
