"""The tables and figures of the study of sparse activation, and what they say of its claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..models.sparse_activations import FATReLU, StatisticalTopK, TopK
from ..research.study.figures import Axis, Line, line_plot
from ..research.study.runs import write_atomically
from ..research.study.tables import Cell, Measured, Table
from .sparse_activation_work import GRID

Result = Mapping[str, Any]
Results = Sequence[Result]

CLAIMED_INPUTS, CLAIMED_SHARE = 0.8, 0.05  # of which share of the neurons is active
ALMOST_ALL = 0.95
LOSS = 0.01  # nats; smaller differences count as equal loss


def write_sparse_activation(folder: Path, results: Results, page: Path | None) -> str:
    """Write tables and figures under `folder`, the tables also into `page`; return the text."""
    tables = {
        "sizes": size_table(results),
        "steps": step_table(results),
        "induced": induced_table(results),
    }
    for name, table in tables.items():
        table.write(folder / "tables", name)
    for name, svg in figures(results).items():
        write_atomically(folder / "figures" / f"{name}.svg", svg)
    titles = {"sizes": "Size", "steps": "Training", "induced": "Fewer active neurons"}
    shown = [f"## {titles[name]}\n\n{table.caption}\n\n{table.markdown()}" for name, table in tables.items()]
    text = "\n".join([*shown, f"## What holds\n\n{verdicts(results)}"])
    if page is not None:
        write_atomically(page, text)
    return text


def size_table(results: Results) -> Table:
    """A row for each size of decoder: loss and which neurons are active."""
    found = natural(results)
    tokens = found[0]["tokens"]
    model = ("D", "layers", "F", "parameters", "loss")
    shares = ("active, %", "by layer, %", "in training, %", "inputs below 5%, %", "80% of inputs, %")
    columns = (*model, *shares, "ever active, %", "active", "effective")
    rows: list[tuple[Cell, ...]] = []
    for (width, layers, neurons), runs in by_size(found):
        by_layer = [fmean(values) for values in zip(*(run["by layer"] for run in runs), strict=True)]
        rows.append(
            (
                width,
                layers,
                neurons,
                runs[0]["parameters"],
                mean(runs, "loss"),
                mean(runs, "active", 100),
                f"{100 * min(by_layer):.1f} to {100 * max(by_layer):.1f}",
                mean(runs, "train active", 100),
                mean(runs, "below 5%", 100),
                mean(runs, "inputs' 80%", 100),
                mean(runs, "ever active", 100),
                mean(runs, "active", neurons),
                mean(runs, "effective"),
            )
        )
    caption = (
        f"ReLU decoders of width D with F neurons a layer, {counted(found)}, on {tokens:,} tokens that were "
        f"held out. *Active*: share of a layer's neurons above 0, mean over tokens and layers; *by layer*: "
        f"the least and the most active layer; *in training*: on text that was trained on; *inputs below "
        f"5%*: (token, layer) pairs with less than 5% of the neurons active; *80% of inputs*: the share of "
        f"active neurons that 80% of them keep to; *ever active*: neurons that some token activates; then "
        f"how many neurons of a layer are active, and their effective number (exp of the entropy of sizes)."
    )
    return Table(columns, tuple(rows), caption)


def step_table(results: Results) -> Table:
    """A row for each kind of data: the active share on the way."""
    found = trainings(results)
    steps = [one["step"] for one in found[0]["steps"]]
    rows: list[tuple[Cell, ...]] = []
    for (data,), runs in grouped(found, "data").items():
        series = zip(*([one["active"] for one in run["steps"]] for run in runs), strict=True)
        rows.append((data, *(Measured.of([100 * value for value in values]) for values in series)))
    caption = (
        "Active neurons in %, of the base decoder, after so many steps, by what it is trained and measured "
        "on: text, text with targets drawn evenly from the vocabulary, and such inputs and targets."
    )
    return Table(("trained on", *(f"step {step}" for step in steps)), tuple(rows), caption)


def induced_table(results: Results) -> Table:
    """A row for each way to have fewer active neurons: its loss beside ReLU's."""
    found = base_sized(results)
    dense = mean_of(found["relu"], "loss")
    rows: list[tuple[Cell, ...]] = [
        (
            name,
            runs[0]["F"],
            mean(runs, "loss"),
            f"{mean_of(runs, 'loss') - dense:+.3f}",
            mean(runs, "active", 100),
            mean(runs, "below 5%", 100),
            mean(runs, "ever active", 100),
            mean(runs, "active", runs[0]["F"]),
        )
        for name, runs in found.items()
    ]
    columns = ("feed-forward", "F", "loss", "to relu", "active, %", "inputs below 5%, %", "ever active, %")
    caption = f"The base decoder with other feed-forward layers, {counted(found['relu'])}; weights as many."
    return Table((*columns, "active"), tuple(rows), caption)


def figures(results: Results) -> dict[str, str]:
    """The distribution over inputs, the course of training, counts against width, and loss against share."""
    sizes = natural(results)
    share, inputs = Axis("share of a layer's neurons that is active"), Axis("share of inputs at or below")
    curves = [
        Line(f"D {d}, {n} layers, F {f}", GRID.tolist(), [run["cumulative"] for run in runs])
        for (d, n, f), runs in by_size(sizes)
    ]
    often = [
        Line(f"D {d}, {n} layers, F {f}", run_mean(runs, "frequency"), [GRID.tolist()])
        for (d, n, f), runs in by_size(sizes)
    ]
    course = [
        Line(
            data,
            [one["step"] for one in runs[0]["steps"]],
            [[one["active"] for one in run["steps"]] for run in runs],
        )
        for (data,), runs in grouped(trainings(results), "data").items()
    ]
    drawn = {
        "inputs": line_plot("Active neurons of an input", share, inputs, curves),
        "neurons": line_plot(
            "How often a neuron fires", Axis("share of inputs"), Axis("share of neurons at or below"), often
        ),
        "steps": line_plot("During training", Axis("step"), Axis("share of active neurons"), course),
        "quality": line_plot(
            "Loss against active neurons", Axis("share of active neurons"), Axis("loss, nats"), costs(results)
        ),
    }
    return drawn | widths_figure(results)


def widths_figure(results: Results) -> dict[str, str]:
    """How many neurons are active as a layer has more, where the study has several widths of it."""
    found = grouped(neuron_series(results), "F")
    if len(found) < 2:
        return {}
    series = sorted(((neurons, runs) for (neurons,), runs in found.items()), key=lambda each: each[0])
    x = [neurons for neurons, _ in series]
    fewest = min(len(runs) for _, runs in series)
    lines = [
        Line(name, x, [[value(runs[i], neurons) for neurons, runs in series] for i in range(fewest)])
        for name, value in (
            ("active", lambda run, neurons: run["active"] * neurons),
            ("effective", lambda run, neurons: run["effective"]),
        )
    ]
    title = "Active neurons of a layer against its width"
    return {"widths": line_plot(title, Axis("F", log=True), Axis("neurons", log=True), lines)}


def costs(results: Results) -> list[Line]:
    """Loss over share of active neurons: a line for each kind, a point for each of its strengths."""
    kinds: dict[str, list[Results]] = {}
    for name, runs in base_sized(results).items():
        kinds.setdefault(kind_of(runs[0], name), []).append(runs)
    lines = []
    for kind, groups in kinds.items():
        ordered = sorted(groups, key=lambda runs: mean_of(runs, "active"))
        points = [mean_of(runs, "active") for runs in ordered]
        lines.append(Line(kind, points, [[mean_of(runs, "loss") for runs in ordered]]))
    return lines


def verdicts(results: Results) -> str:
    """Sentences on the claims with their figures, as a Markdown list."""
    sizes = grouped(natural(results), "width", "layers", "F")
    sparsest = max(sizes.values(), key=lambda runs: mean_of(runs, "below 5%"))
    most = mean_of(sparsest, "below 5%")
    least = min(mean_of(runs, "ever active") for runs in sizes.values())
    lines = [
        f"80% of inputs activate less than 5% of the neurons: {said(most >= CLAIMED_INPUTS)} (at most "
        f"{most:.1%} of the inputs, of {len(sizes)} sizes).",
        f"Almost every neuron is active for some input: {said(least >= ALMOST_ALL)} (at least {least:.1%}).",
        *(larger(name, series, by) for name, series, by in axes(results)),
        *noise_lines(results),
        *(cheapest(results, kind) for kind in (TopK, StatisticalTopK)),
    ]
    return "".join(f"* {line}\n" for line in lines if line)


def axes(results: Results) -> list[tuple[str, Results, str]]:
    """Names and cells of the three ways to be larger, and the field that grows."""
    base = results[0]
    found = natural(results)
    four = [one for one in found if one["F"] == 4 * one["width"]]
    return [
        ("wider", [one for one in four if one["layers"] == base["layers"]], "width"),
        ("deeper", [one for one in four if one["width"] == base["width"]], "layers"),
        ("with more neurons a layer", neuron_series(results), "F"),
    ]


def larger(name: str, found: Results, by: str) -> str:
    """Whether the largest is sparser than the smallest, and whether each is than the one before."""
    series = sorted(((key, runs) for (key,), runs in grouped(found, by).items()), key=lambda each: each[0])
    if len(series) < 2:
        return ""
    means = [mean_of(runs, "active") for _, runs in series]
    apart = beyond(means[0] - means[-1], series[0][1], series[-1][1], "active", 0.005)
    way = ", ".join(f"{key}: {100 * value:.1f}%" for (key, _), value in zip(series, means))
    steady = "" if sorted(means, reverse=True) == means else "; not at every step"
    return f"Decoders {name} are sparser: {said(apart)}{steady if apart else ''} ({by} {way})."


def noise_lines(results: Results) -> list[str]:
    """Whether neurons fall silent without anything to learn."""
    lines = []
    for (data,), runs in grouped(trainings(results), "data").items():
        first = fmean(run["steps"][0]["active"] for run in runs)
        last = fmean(run["steps"][-1]["active"] for run in runs)
        word = said(last < first - 0.005)
        lines.append(f"Training on {data} makes neurons silent: {word} ({first:.1%} to {last:.1%} active).")
    return lines


def cheapest(results: Results, kind: type) -> str:
    """The fewest neurons that a kind of top-k needs for ReLU's loss."""
    found = base_sized(results)
    dense = found["relu"]
    equal = [
        runs
        for runs in found.values()
        if isinstance(runs[0]["activation"], kind)
        and not beyond(mean_of(runs, "loss") - mean_of(dense, "loss"), runs, dense, "loss", LOSS)
    ]
    tried = any(isinstance(runs[0]["activation"], kind) for runs in found.values())
    if not tried:
        return ""
    name = "Top-k" if kind is TopK else "Statistical top-k"
    if not equal:
        return f"{name} reaches ReLU's loss: does not hold at any k that was tried."
    best = min(equal, key=lambda runs: mean_of(runs, "active"))
    fewer = said(mean_of(best, "active") < mean_of(dense, "active"))
    mine, own = ((mean_of(runs, "active"), mean_of(runs, "loss")) for runs in (best, dense))
    return (
        f"{name} reaches ReLU's loss with fewer neurons: {fewer} (k={best[0]['activation'].k}: {mine[0]:.1%} "
        f"active, loss {mine[1]:.3f}; ReLU {own[0]:.1%}, {own[1]:.3f})."
    )


def beyond(gap: float, one: Results, other: Results, name: str, least: float) -> bool:
    """Whether a gap is more than `least` and, where there are seeds, than two deviations of a difference."""
    values = [[run[name] for run in runs] for runs in (one, other)]
    spread = sum(stdev(each) ** 2 for each in values if len(each) > 1) ** 0.5
    return gap > max(least, 2 * spread)


def natural(results: Results) -> Results:
    """The cells with plain ReLU, trained on text."""
    return [one for one in results if one["data"] == "text" and kind_of(one, "relu") == "relu"]


def neuron_series(results: Results) -> Results:
    """The cells of natural decoders that differ from the base in F alone."""
    base = results[0]
    return [one for one in natural(results) if all(one[name] == base[name] for name in ("width", "layers"))]


def trainings(results: Results) -> Results:
    """The base decoder on each kind of data."""
    base = results[0]
    same = ("width", "layers", "F", "activation", "penalty")
    return [one for one in results if all(one[name] == base[name] for name in same)]


def base_sized(results: Results) -> dict[str, list[Result]]:
    """Every feed-forward layer of the base decoder on text, by name."""
    base, found = results[0], dict[str, list[Result]]()
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


def said(holds: bool) -> str:
    """The word of docs/claims.md."""
    return "holds at this scale" if holds else "does not hold at this scale"
