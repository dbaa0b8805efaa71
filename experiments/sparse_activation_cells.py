"""The cells of the study of sparse activation: chosen, named, grouped and averaged for its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from .. import InputError
from ..models.sparse_activations import FATReLU, StatisticalTopK, TopK
from ..research.study.tables import Measured

Result = Mapping[str, Any]
Results = Sequence[Result]


def base_of(results: Results) -> Result:
    """The cell that all others are compared with, of whichever seed is finished first.

    Raises `InputError` where there is none: of a study that was stopped others may be finished.
    """
    for one in results:
        if one["base"]:
            return one
    raise InputError(
        f"the base decoder, with which {len(results)} finished cells are compared, is not finished: run the "
        f"study without --finished"
    )


def natural(results: Results) -> Results:
    """The cells with plain ReLU, trained on text."""
    return [one for one in results if one["data"] == "text" and kind_of(one, "relu") == "relu"]


def neuron_series(results: Results) -> Results:
    """The cells of natural decoders that differ from the base in F alone."""
    base = base_of(results)
    return [one for one in natural(results) if all(one[name] == base[name] for name in ("width", "layers"))]


def trainings(results: Results) -> Results:
    """The base decoder on each kind of data."""
    base = base_of(results)
    same = ("width", "layers", "F", "activation", "penalty")
    return [one for one in results if all(one[name] == base[name] for name in same)]


def base_sized(results: Results) -> dict[str, list[Result]]:
    """Every feed-forward layer of the base decoder on text, by name."""
    base, found = base_of(results), dict[str, list[Result]]()
    for one in results:
        if one["data"] == "text" and all(one[name] == base[name] for name in ("width", "layers", "neurons")):
            found.setdefault(name_of(one), []).append(one)
    return found


def name_of(one: Result) -> str:
    """What a table calls the feed-forward layer."""
    match one["activation"]:
        case TopK(k):
            return f"top-k, k={k}"
        case StatisticalTopK(k):
            return f"statistical top-k, k={k}"
        case FATReLU(threshold):
            return f"FATReLU at {threshold:g}"
        case name:
            return f"{name}, L1 price {one['penalty']:g}" if one["penalty"] else str(name)


def kind_of(one: Result, name: str) -> str:
    """What a figure joins into one line."""
    if one["penalty"]:
        return "relu, L1"
    return {TopK: "top-k", StatisticalTopK: "statistical top-k"}.get(
        type(one["activation"]), name if name != "relu" else name_of(one)
    )


def grouped(results: Results, *names: str) -> dict[tuple, list[Result]]:
    """By the values of some fields."""
    groups: dict[tuple, list[Result]] = {}
    for one in results:
        groups.setdefault(tuple(one[name] for name in names), []).append(one)
    return groups


def by_size(results: Results) -> list[tuple[tuple[int, int, int], list[Result]]]:
    """The sizes with their runs, the smallest first."""
    return sorted(grouped(results, "width", "layers", "F").items(), key=lambda each: each[0])


def mean(runs: Results, name: str, factor: float = 1.0) -> Measured:
    """A value over seeds."""
    return Measured.of([factor * run[name] for run in runs])


def mean_of(runs: Results, name: str) -> float:
    """A value's mean over seeds."""
    return fmean(run[name] for run in runs)


def run_mean(runs: Results, name: str) -> list[float]:
    """A curve's mean over seeds."""
    return [fmean(values) for values in zip(*(run[name] for run in runs), strict=True)]


def counted(runs: Results) -> str:
    """How many seeds there are."""
    seeds = len({run["seed"] for run in runs})
    return "one seed" if seeds == 1 else f"mean ± s.d. of up to {seeds} seeds"


def seeds_of(*groups: Results) -> str:
    """On how many seeds a statement on these groups stands."""
    counts = [len({run["seed"] for run in runs}) for runs in groups]
    least, most = min(counts), max(counts)
    if most == 1:
        return "one seed"
    return f"{most} seeds" if least == most else f"{least} to {most} seeds"
