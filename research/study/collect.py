"""One page from any folder of runs: what differs between them, what they measured, how they got there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import InputError
from .configs import flatten
from .figures import Axis, Line, line_plot
from .records import STEP, read_records
from .report import Report, Section
from .runs import CONFIG, ENVIRONMENT, METRICS, RESULT, TREE, read_json, run_folders
from .tables import Cell, Table, summarise

# What identifies a run but is no choice, or is averaged over.
NOT_COMPARED = ("id", "seed", "data_fingerprint", "revision")
LINES = 12
POINTS = 400


@dataclass(frozen=True)
class Collected:
    """A run as it lies on disk; `result` is empty where it is not finished, `tree` without a delta."""

    name: str
    question: Mapping[str, Any]
    result: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    environment: Mapping[str, Any]
    tree: str = ""


def collect(root: Path) -> list[Collected]:
    """The runs at or below `root`; raises `InputError` where there is none."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give a folder of runs")
    runs = [_read(folder, root) for folder in run_folders(root)]
    if not runs:
        raise InputError(f"{root}: holds no run (a folder with {CONFIG}); give a folder of runs")
    return runs


def report_from_runs(root: Path) -> Report:
    """The page of the runs at or below `root`."""
    runs = collect(root)
    finished = sum(bool(run.result) for run in runs)
    sections = [
        Section(f"Runs that measured {_listed(group[0])}", (), [_results(group)], _curves(group))
        for group in kinds(runs)
    ]
    return Report(
        title=f"Runs in {root.resolve().name}",
        summary=f"{len(runs)} runs, {finished} finished; results are means ± standard deviations over seeds.",
        sections=sections,
        details={f"{run.name}: environment": _lines(run.environment) for run in runs[:1]}
        | {f"{run.name}: configuration": _lines(flatten(run.question)) for run in runs[:LINES]}
        | {f"{run.name}: what is tuned": run.tree for run in runs[:LINES] if run.tree},
    )


def result_tables(runs: Sequence[Collected]) -> list[Table]:
    """One table for each kind of run: the fields that differ within the kind, then what was measured."""
    return [_results(group) for group in kinds(runs)]


def kinds(runs: Sequence[Collected]) -> list[list[Collected]]:
    """The finished runs, grouped by what they measured."""
    groups: dict[tuple[str, ...], list[Collected]] = {}
    for run in runs:
        if run.result:
            groups.setdefault(tuple(sorted(_measured(run))), []).append(run)
    return list(groups.values())


def differing(runs: Sequence[Collected]) -> list[str]:
    """The configuration's fields that are not the same in all runs, without seeds and fingerprints.

    Fields that only some runs have (a method's own) are left out where the others tell the runs apart.
    """
    flat = [flatten(run.question) for run in runs]
    names = dict.fromkeys(name for one in flat for name in one)
    varying = [name for name in names if len({repr(one.get(name)) for one in flat}) > 1]
    varying = [name for name in varying if not set(name.split(".")) & set(NOT_COMPARED)]
    common = [name for name in varying if all(name in one for one in flat)]

    def told_apart(fields: Sequence[str]) -> int:
        return len({tuple(repr(one.get(name)) for name in fields) for one in flat})

    return common if told_apart(common) == told_apart(varying) else varying


def _results(runs: Sequence[Collected]) -> Table:
    fields = differing(runs)
    short = {name: _short(name, fields) for name in fields}
    values = [n for n in _measured(runs[0]) if not n.startswith("memory_") and n != "best_step"]
    rows = []
    for run in runs:
        flat = flatten(run.question)
        row: dict[str, Cell] = {short[name]: _cell(flat.get(name)) for name in fields}
        rows.append({**row, **_measured(run), "run": run.name})
    by = list(short.values()) or ["run"]
    return summarise(rows, by, values)


def _read(folder: Path, root: Path) -> Collected:
    def load(name: str) -> Mapping[str, Any]:
        return read_json(folder / name) if (folder / name).exists() else {}

    metrics = folder / METRICS
    name = str(folder.relative_to(root)) if folder != root else folder.name
    records = read_records(metrics) if metrics.exists() else []
    tree = (folder / TREE).read_text(encoding="utf-8") if (folder / TREE).exists() else ""
    return Collected(name, load(CONFIG), load(RESULT), records, load(ENVIRONMENT), tree)


def _measured(run: Collected) -> dict[str, float]:
    return {
        name: value
        for name, value in run.result.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != STEP
    }


def _curves(runs: Sequence[Collected]) -> list[str]:
    figures = []
    for field, title in (("loss", "Training loss"), ("evaluation_loss", "Evaluation loss")):
        lines = [line for run in runs if (line := _line(run, field)) is not None]
        figures += [
            line_plot(title, Axis("step"), Axis("nats"), lines[start : start + LINES])
            for start in range(0, len(lines), LINES)
        ]
    return figures


def _listed(run: Collected) -> str:
    names = [name.replace("_", " ") for name in _measured(run) if not name.startswith("memory_")]
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _line(run: Collected, field: str) -> Line | None:
    points = [(record[STEP], record[field]) for record in run.records if field in record]
    if not points:
        return None
    steps, values = zip(*points[:: max(1, len(points) // POINTS)])
    return Line(run.name, steps, [values])


def _short(name: str, names: Sequence[str]) -> str:
    """The last part of a dotted name, or all of it where another field ends alike."""
    last = name.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in names) == 1 else name


def _cell(value: Any) -> Cell:
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _lines(mapping: Mapping[str, Any]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in mapping.items())
