"""The tables and figures of the study of MoEfication, and what they say of its claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..models.selection import OracleSelection
from ..research.study.figures import Axis, Line, line_plot
from ..research.study.runs import write_atomically
from ..research.study.tables import Cell, Measured, Table
from .bench.ffn import DENSE, Key, Seen, take_turns
from .bench.ffn_job import FeedForwardJob, FeedForwardStack
from .moefication import ROUTERS, THRESHOLD, Size, used

Results = Sequence[Mapping[str, Any]]
KEPT, HEADLINE = 0.97, 0.2  # what is claimed of which share


def write_moefication(folder: Path, results: Results, costs: Table | None, page: Path | None) -> str:
    """Write tables and figures under `folder`, the tables also into `page`; return the text."""
    parts = []
    for name in dict.fromkeys(result["subject"] for result in results):
        mine = used(results, subject=name)
        tables = {"quality": quality_table(mine), "mass": mass_table(mine)}
        for label, table in tables.items():
            table.write(folder / "tables", f"{name.replace(' ', '-')}-{label}")
        for label, svg in figures(name, mine).items():
            write_atomically(folder / "figures" / f"{name.replace(' ', '-')}-{label}.svg", svg)
        shown = "\n\n".join(f"{table.caption}\n\n{table.markdown()}" for table in tables.values())
        parts.append(f"## {name}\n\n{shown}\n{verdicts(mine)}")
    if costs is not None:
        costs.write(folder / "tables", "costs")
        parts.append(f"## Cost\n\n{costs.caption}\n\n{costs.markdown()}")
    text = "\n".join(parts)
    if page is not None:
        write_atomically(page, text)
    return text


def quality_table(results: Results) -> Table:
    """A row a construction and router: accuracy in % of the dense model's at each share."""
    first = results[0]
    made = "; ".join(f"{what} {100 * value:.1f}%" for what, value in first["made"].items() if " " in what)
    caption = (
        f"Accuracy in % of the dense ReLU model's, which is {100 * first['dense accuracy']:.1f}% "
        f"(loss {first['dense loss']:.3f}){f'; in training, {made}' if made else ''}. Mean ± s.d. of "
        f"{_seeds(results)} seeds, by the share of neurons that a token uses."
    )
    return _by_share(results, caption, lambda one: 100 * one["accuracy"] / one["dense accuracy"])


def mass_table(results: Results) -> Table:
    """A row a construction and router: the share of the activation mass that is captured at each share."""
    caption = (
        "Captured activation mass in %, mean over layers, and in brackets recall: how many of the truly most "
        "massive experts were chosen."
    )
    shares = _shares(results)
    rows = []
    for (construction, router), runs in _groups(results).items():
        cells = [
            f"{100 * fmean(r['mass'] for r in at):.1f} ({100 * fmean(r['recall'] for r in at):.0f})"
            for share in shares
            if (at := [run for run in runs if run["share"] == share and "mass" in run])
        ]
        if cells:
            rows.append((construction, router, *cells))
    return Table(("experts", "router", *(f"{share:.0%}" for share in shares)), tuple(rows), caption)


def figures(name: str, results: Results) -> dict[str, str]:
    """Quality against the share: for each construction under the MLP router, for each router on clusters."""
    shares = _shares(results)
    axes = Axis("share of neurons used", log=False), Axis("accuracy, % of the dense model's")

    def lines(of: str, **fixed: str) -> list[Line]:
        found = []
        for label in dict.fromkeys(r[of] for r in used(results, **fixed)):
            mine = used(results, **fixed, **{of: label})
            runs = [
                [
                    next(_kept(r) for r in mine if r["seed"] == seed and r["share"] == share)
                    for share in shares
                ]
                for seed in dict.fromkeys(r["seed"] for r in mine)
            ]
            found.append(Line(label, list(shares), runs))
        return found

    wanted = {
        "constructions": lines("construction", router="MLP"),
        "routers": lines("router", construction="clusters"),
    }
    titles = {"constructions": "experts by the MLP router", "routers": "routers on clusters"}
    return {
        label: line_plot(f"{name}: {titles[label]}", *axes, series)
        for label, series in wanted.items()
        if series
    }


def verdicts(results: Results) -> str:
    """Sentences on the claims at 20% of the neurons, with their figures, as a Markdown list."""
    at = [one for one in results if one["share"] == HEADLINE]
    values = {key: [_kept(run) for run in runs] for key, runs in _groups(at).items()}
    clusters, random = values.get(("clusters", "MLP")), values.get(("random", "MLP"))
    lines = []
    if clusters:
        word = "holds" if fmean(clusters) >= 100 * KEPT else "does not hold"
        lines.append(
            f"At {HEADLINE:.0%} of the neurons, clusters with the MLP router keep at least {KEPT:.0%} of the "
            f"accuracy: {word} ({fmean(clusters):.1f}%)."
        )
    if clusters and random:
        gap, spread = fmean(clusters) - fmean(random), _spread(clusters, random)
        word = "holds" if gap > max(2 * spread, 1.0) else "does not hold"
        lines.append(
            f"Random experts are clearly worse: {word} ({gap:+.1f} points from random to clusters, "
            f"{f'the two spreads together {spread:.1f}' if spread else 'of one seed'})."
        )
    oracle = values.get(("random", "oracle"))
    if oracle and random:
        lines.append(
            f"With an oracle random experts keep {fmean(oracle):.1f}%, with the MLP router "
            f"{fmean(random):.1f}%: the router loses {fmean(oracle) - fmean(random):.1f} points."
        )
    single = values.get(THRESHOLD)
    if single and clusters:
        lines.append(
            f"A training-free threshold on single neurons keeps {fmean(single):.1f}% at the same share; it "
            f"has to compute the first product whole."
        )
    return "".join(f"* {line}\n" for line in lines)


def measure_costs(size: Size, shapes: Mapping[str, tuple[int, int, int]], rounds: int = 15) -> Table:
    """Products and time of the feed-forward stack of each model `(width, neurons, layers)` for one token.

    Times are paired: the dense stack and all others take turns; `auto` is the implementation.
    """
    rows: list[tuple[Cell, ...]] = []
    for name, (width, neurons, layers) in shapes.items():
        for label, selection in ROUTERS.items():
            if label not in size.routers or isinstance(selection, OracleSelection):
                continue
            job = FeedForwardJob(name, width, neurons, layers, size.neurons, selection=selection)
            stack, seen = FeedForwardStack(job), Seen()
            keys: dict[float, Key] = {share: (name, 1, share, "auto") for share in size.shares}
            runs = {(name, 1, 1.0, DENSE): stack.prepare(DENSE, 1, 1.0)}
            runs |= {key: stack.prepare("auto", 1, share) for share, key in keys.items()}
            take_turns(runs, rounds, seen.times)
            router = selection.flops(width, job.experts) / (4 * width * neurons)
            cells = [f"{share + router:.0%} / {seen.gain(key)[0]:.1f}×" for share, key in keys.items()]
            rows.append((name, label, *cells))
    caption = (
        "Products of the converted feed-forward layers in % of the dense layers', router included, and how "
        "many times faster they are for one token on this machine's CPU: median over paired turns."
    )
    return Table(("model", "router", *(f"{share:.0%}" for share in size.shares)), tuple(rows), caption)


def _kept(result: Mapping[str, Any]) -> float:
    return 100 * result["accuracy"] / result["dense accuracy"]


def _by_share(results: Results, caption: str, value: Any) -> Table:
    shares = _shares(results)
    rows: list[tuple[Cell, ...]] = []
    for (construction, router), runs in _groups(results).items():
        found = [[value(run) for run in runs if run["share"] == share] for share in shares]
        rows.append((construction, router, *(Measured.of(each) if each else None for each in found)))
    return Table(("experts", "router", *(f"{share:.0%}" for share in shares)), tuple(rows), caption)


def _groups(results: Results) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """By construction and router, constructions together."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for construction in dict.fromkeys(result["construction"] for result in results):
        for result in used(results, construction=construction):
            groups.setdefault((construction, result["router"]), []).append(result)
    return groups


def _shares(results: Results) -> list[float]:
    return sorted({result["share"] for result in results})


def _seeds(results: Results) -> int:
    return len({result["seed"] for result in results})


def _spread(one: Sequence[float], other: Sequence[float]) -> float:
    """Standard deviation of the difference of two single runs; 0 where there is one run each."""
    return float(sum(stdev(values) ** 2 for values in (one, other) if len(values) > 1) ** 0.5)
