"""The tables and figures of the study of sparse activation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from ..research.study.figures import Axis, Line, line_plot
from ..research.study.runs import write_atomically
from ..research.study.tables import Cell, Measured, Table
from .moefication_subjects import LENGTH
from .sparse_activation_cells import (
    Results,
    base_of,
    base_sized,
    by_size,
    counted,
    grouped,
    kind_of,
    mean,
    mean_of,
    natural,
    neuron_series,
    run_mean,
    trainings,
)
from .sparse_activation_verdicts import verdicts
from .sparse_activation_work import GRID


def write_sparse_activation(folder: Path, results: Results, page: Path | None) -> str:
    """Write tables and figures under `folder`, the tables also into `page`; return the text.

    Raises `InputError`, before anything is written, where no cell is of the base decoder.
    """
    base_of(results)
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
        write_page(page, results, text)
    return text


def write_page(page: Path, results: Results, text: str) -> None:
    """The tables between what was asked and the figures, which lie in a folder of the page's name."""
    drawn, beside = figures(results), page.with_suffix("")
    for name, svg in drawn.items():
        write_atomically(beside / f"{name}.svg", svg)
    shown = "\n".join(f"![{name}]({beside.name}/{name}.svg)\n" for name in drawn)
    write_atomically(page, f"{introduction(results)}\n{text}\n## Figures\n\n{shown}")


def introduction(results: Results) -> str:
    """What was trained on what, by which command, and how much of it there is."""
    base = base_of(results)
    seeds = sorted({one["seed"] for one in results})
    cells = ", ".join(f"{sum(one['seed'] == seed for one in results)} of seed {seed}" for seed in seeds)
    return (
        "# Which neurons fire in small decoders, and what it costs to let fewer of them\n\n"
        "`experiments/sparse_activation.py`: decoders trained from scratch on WikiText-2's valid split and "
        f"Tiny Shakespeare, {base['vocab']:,} words, {base['steps'][-1]['step']} steps of "
        f"{base['batch']}×{LENGTH} tokens (AdamW, rate {base['rate']:g}), measured on {base['tokens']:,} "
        "tokens that these hold out. "
        f"This page has {len(results)} cells: {cells}.\n\n"
        "    modicum study sparse-activation --markdown docs/results/sparse_activation.md\n\n"
        "runs what is left of three seeds and writes this page; with `--finished` it writes it from what is "
        "there.\n"
    )


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
    shown = apart(steps)
    rows: list[tuple[Cell, ...]] = []
    for (data,), runs in grouped(found, "data").items():
        series = zip(*([one["active"] for one in run["steps"]] for run in runs), strict=True)
        means = [Measured.of([100 * value for value in values]) for values in series]
        rows.append((data, *(means[place] for place in shown)))
    caption = (
        "Active neurons in %, of the base decoder, after so many steps, by what it is trained and measured "
        "on: text, text with targets drawn evenly from the vocabulary, and such inputs and targets."
    )
    return Table(("trained on", *(f"step {steps[place]}" for place in shown)), tuple(rows), caption)


def apart(steps: Sequence[int]) -> list[int]:
    """The places of steps to show: not one that the last, where training ends, follows at once."""
    return [
        place
        for place, step in enumerate(steps)
        if step == steps[-1] or steps[-1] - step >= (steps[1] - steps[0]) / 2
    ]


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
        Line(decoder_name(d, n, f), GRID.tolist(), [run["cumulative"] for run in runs])
        for (d, n, f), runs in by_size(sizes)
    ]
    often = [
        Line(decoder_name(d, n, f), run_mean(runs, "frequency"), [GRID.tolist()])
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


def decoder_name(width: int, layers: int, neurons: int) -> str:
    """What a figure calls a size."""
    return f"D {width}, {layers} layer{'s' * (layers > 1)}, F {neurons}"


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
