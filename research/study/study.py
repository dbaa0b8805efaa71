"""The frame of a study: cells of a sweep, each a run, and what is left to do after a stop.

A study is a frozen dataclass; a sweep gives overrides of its fields; a cell is the study with one set of
overrides. Finished cells are not run again, so a study that was stopped goes on with the same command.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ... import InputError
from .runs import Run, run_name
from .sweeps import Sweep, apply, label
from .tables import Table, summarise

logger = logging.getLogger(__name__)

Config = TypeVar("Config")
Result = Mapping[str, Any]
Cell = Callable[[Config, Run], Result]


def run_cell(
    root: Path,
    config: Any,
    name: str,
    ask: Callable[[Path], Result],
    *,
    seed: int,
    data_fingerprint: str,
    revision: int,
) -> Run:
    """The finished run of one question, its folder called `name` and the beginning of the run's identity.

    Where it is not finished `ask(folder)` is, and its result is kept with the `seconds` that it took.
    """
    name = run_name(name, config, seed, data_fingerprint, revision)
    run = Run.open(root, config, seed=seed, data_fingerprint=data_fingerprint, revision=revision, name=name)
    if run.state != "finished":
        start = time.perf_counter()
        result = ask(run.folder)
        run.finish({**result, "seconds": round(time.perf_counter() - start, 1)})
        logger.warning("%s: %.0f s", name, time.perf_counter() - start)
    return run


def run_study(
    root: Path,
    base: Config,
    sweep: Sweep,
    cell: Cell[Config],
    *,
    data_fingerprint: str = "",
    revision: int = 1,
) -> list[dict[str, Any]]:
    """Run `cell(config, run)` for every set of overrides; return its results beside the overrides.

    `cell` trains and measures; its mapping finishes the run. A cell that raises `InputError` is reported
    and the others go on; at the end the failures are raised together as one.
    """
    results, failures = [], []
    for overrides in sweep:
        config = apply(base, overrides)
        run = Run.open(root, config, data_fingerprint=data_fingerprint, revision=revision)
        if run.state != "finished":
            try:
                run.finish(cell(config, run))
            except InputError as error:
                failures.append(f"{label(overrides)}: {error}")
                logger.warning("%s", failures[-1])
                continue
        results.append({**overrides, **run.result})
    if failures:
        raise InputError(f"{len(failures)} of {len(sweep)} cells failed; {'; '.join(failures)}")
    return results


def write_tables(
    root: Path, name: str, results: list[dict[str, Any]], by: list[str], values: list[str]
) -> Table:
    """Means ± standard deviations over what is not in `by`, as CSV and Markdown under `root`."""
    table = summarise(results, by, values)
    table.write(root, name)
    return table
