"""The tables and figures of the study of skill neurons, and what they say of the claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from ..research.neurons import bootstrap
from ..research.neurons.figures import curves, interval_bars, label_histograms
from ..research.neurons.perturbation import Interval
from ..research.study.runs import write_atomically
from ..research.study.tables import Cell, Measured, Table
from .skill_neurons_deltas import delta_relations, deltas_table
from .skill_neurons_relations import layer_table, relations, similarities

Found = Mapping[str, Any]


def write_report(
    folder: Path,
    found: Found,
    kinds: Mapping[str, str],
    page: Path | None,
    parts_trained: Sequence[float],
) -> str:
    """Write tables and figures under `folder`, and all of it into `page`; return the text.

    `parts_trained` are the study's checkpoints.
    """
    figures = folder / "figures" if page is None else page.with_suffix("")
    names = list(dict.fromkeys(name for name, _ in found["trial"]))
    seeds = sorted({seed for _, seed in found["trial"]})
    measured = sorted({seed for _, seed in found["effects"]})
    of_kind, maps = [kinds[name] for name in names], similarities(found, names, seeds)
    similar = relations(found, names, seeds, measured, of_kind, figures)
    verdicts = _verdicts(found, names, seeds, measured, similar.rows[0])
    parts = []
    for title, table in (
        ("Single neurons beside the prompt", accuracy_table(found, names, seeds)),
        ("Perturbed", perturbation_table(found, names, measured)),
        ("Only the skill neurons left", kept_table(found, names, measured)),
        ("Speed", speed_table(found["speed"])),
        ("Transfer of prompts", transfer_table(found, names, measured)),
        ("What tasks have in common", similar),
        ("Transfer of deltas", deltas_table(found, names, measured)),
        ("Whose delta serves whom", delta_relations(found, maps, names, measured, of_kind)),
        ("By layer", layer_table(found, names, seeds, [kinds[name] for name in names])),
        ("Functional experts", modules_table(found, names, measured)),
        ("When predictivities settle", stability_table(found, names, measured, parts_trained)),
    ):
        table.write(folder / "tables", title.lower().replace(" ", "-"))
        parts.append(f"## {title}\n\n{table.caption}\n\n{table.markdown()}")
    perturbation_figure(found, names, measured, figures / "perturbation.png")
    neuron_figure(found["values"], figures / "neuron.png")
    modules_figure(found, names, measured, figures / "modules.png")
    shown = [f"![{path.stem}]({figures.name}/{path.name})" for path in sorted(figures.glob("*.png"))]
    text = "\n".join([*parts, "".join(f"* {line}\n" for line in verdicts), *(f"{line}\n" for line in shown)])
    if page is not None:
        write_atomically(page, text)
    return text


def accuracy_table(found: Found, names: Sequence[str], seeds: Sequence[int]) -> Table:
    """A row a task: the tuned prompt, and the neuron that is best on dev, measured on test, with controls."""
    keys = ("accuracy", "balanced", "top_test", "untrained_top_test", "shuffled_top_test")
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        runs = [found["trial"][name, seed] for seed in seeds]
        measured = (Measured.of([100 * run[key] for run in runs]) for key in keys)
        layers = ", ".join(str(run["top"][0][0]) for run in runs)
        rows.append((name, round(100 * runs[0]["majority"], 1), *measured, layers))
    columns = (
        "task", "majority", "prompt", "prompt, balanced", "top neuron", "untrained prompt", "shuffled labels",
        "its layer",
    )  # fmt: skip
    caption = (
        f"Test accuracy %, mean ± s.d. of {len(seeds)} seeds. Neurons' accuracies are balanced (both labels "
        f"count alike), of the one neuron that was best on dev; 'untrained prompt': the same before "
        f"training, which begins alike for every seed; 'shuffled labels': chosen by shuffled labels of dev."
    )
    return Table(columns, tuple(rows), caption)


def correctness(found: Found, name: str, seed: int, label: str) -> np.ndarray:
    """1 for the test examples that were right under an intervention, `[N]`."""
    result = found["effects"][name, seed]
    right = np.zeros(result["rows"])
    right[result["correct"][label]] = 1
    return right


class Gap(NamedTuple):
    """Accuracies % with skill neurons changed, with random ones, with each draw of these; the difference."""

    skill: float
    random: float
    draws: Sequence[float]
    interval: Interval

    @property
    def as_bad(self) -> str:
        """How many random draws leave no more than the skill neurons do."""
        return f"{sum(draw <= self.skill for draw in self.draws)} of {len(self.draws)}"


def gap(found: Found, name: str, seeds: Sequence[int], what: str) -> Gap:
    """What a change costs skill and random neurons; examples and draws are resampled for the interval."""
    skill, control = [], []
    for seed in seeds:
        labels = found["effects"][name, seed]["correct"]
        others = [label for label in labels if label.startswith(f"{what}/random")]
        skill += [correctness(found, name, seed, f"{what}/skill")] * len(others)
        control += [correctness(found, name, seed, label) for label in others]
    one, other = 100 * np.array(skill), 100 * np.array(control)
    return Gap(float(one.mean()), float(other.mean()), other.mean(1).tolist(), bootstrap(other - one))


def changes(found: Found, kinds: Sequence[str]) -> list[str]:
    """The interventions of these kinds, such as `noise/0.1`, in order."""
    first = next(iter(found["effects"].values()))["correct"]
    return list(dict.fromkeys(label.rpartition("/")[0] for label in first if label.split("/")[0] in kinds))


def perturbation_table(found: Found, names: Sequence[str], seeds: Sequence[int]) -> Table:
    """A row a task and change: accuracy with skill neurons changed, with random ones, the gap."""
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        for what in changes(found, ("noise", "mean")):
            cost, (kind, fraction) = gap(found, name, seeds, what), what.split("/")
            shown = round(cost.skill, 1), round(cost.random, 1), cost.as_bad, str(cost.interval)
            rows.append((name, kind, f"{float(fraction):.0%}", *shown))
    caption = (
        "Test accuracy % with a share of every layer's neurons changed: normal noise added, its deviation "
        "the root mean square over the layer's neurons and texts of a text's mean activation, or each held "
        "at its mean. Random is the mean of draws; 'as bad': draws that leave no more than skill neurons do. "
        "Gap: random less skill, in points, with its 95% interval over test examples and over which random "
        "neurons were drawn (both resampled 2,000 times), not over seeds."
    )
    return Table(
        ("task", "change", "neurons", "skill", "random", "random as bad", "gap"), tuple(rows), caption
    )


def kept_table(found: Found, names: Sequence[str], seeds: Sequence[int]) -> Table:
    """A row a task: accuracy with only the skill neurons, or as many random ones, left in the upper half."""
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        whole = 100 * fmean(found["trial"][name, seed]["accuracy"] for seed in seeds)
        for what in changes(found, ("kept",)):
            kept = gap(found, name, seeds, what)
            advantage = Interval(-kept.interval.mean, -kept.interval.high, -kept.interval.low)
            share = f"{float(what.split('/')[1]):.0%}"
            shown = round(kept.skill, 1), round(kept.random, 1), str(advantage)
            rows.append((name, round(whole, 1), share, *shown))
    caption = (
        "Test accuracy % where in the upper half of the layers only this share of the neurons is left and "
        "the others are held at their means; the prompt is not tuned again. Advantage: skill less random."
    )
    return Table(("task", "whole", "left", "skill", "random", "advantage"), tuple(rows), caption)


def speed_table(speed: Mapping[str, Any]) -> Table:
    """A row a model: parameters left, time of a forward pass."""
    rows = [
        ("whole" if label == "whole" else f"{float(label):.0%} left", round(100 * speed["share"][label], 1),
         round(found, 1), round(speed["ratio"][label], 2))
        for label, found in speed["milliseconds"].items()
    ]  # fmt: skip
    caption = (
        "Forward pass of 32 texts with the prompt; the upper half's layers are pruned, embeddings count as "
        "parameters. Models take turns; times faster is the median of paired ratios."
    )
    return Table(("model", "parameters %", "ms", "times faster"), tuple(rows), caption)


def transfer_table(found: Found, names: Sequence[str], seeds: Sequence[int]) -> Table:
    """A row a target task, a column a source whose prompt stands in front."""
    sources = [*names, "untrained"]
    rows: tuple[tuple[str | Measured, ...], ...] = tuple(
        (
            name,
            *(Measured.of([100 * found["transfer"][name, seed][each] for seed in seeds]) for each in sources),
        )
        for name in names
    )
    caption = (
        "Test accuracy % of a linear probe on the row's task, from mean hidden states behind the column's "
        "prompt."
    )
    return Table(("task", *sources), rows, caption)


def modules_table(found: Found, names: Sequence[str], seeds: Sequence[int]) -> Table:
    """A row a task: whether its neurons lie together in experts, and what such experts are worth."""
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        runs = [found["modules"][name, seed] for seed in seeds]

        def mean(key: str, runs: Sequence[Mapping[str, Any]] = runs) -> float:
            return fmean(run[key] for run in runs)

        gaps = [_held_gap(runs, what) for what in ("experts", "neurons")]
        rows.append(
            (name, f"{runs[0]['functional']} of {runs[0]['of']}", round(100 * mean("together"), 1),
             round(100 * mean("random"), 1), f"{max(run['p'] for run in runs):.3f}",
             round(100 * mean("untrained_together"), 1), *(str(gap) for gap in gaps))
        )  # fmt: skip
    columns = (
        "task", "functional experts", "together %", "random %", "p", "untrained %", "experts held",
        "neurons held",
    )  # fmt: skip
    caption = (
        "The twentieth of each layer's neurons that predicts best, in experts of like input weights. "
        "Functional: experts with more of these than chance (hypergeometric test, p ≤ 0.001). Together: "
        "pairs of them that share an expert, beside random partitions of the same sizes and the p-value of "
        "that; untrained: of the prompt before training. Held: points of test accuracy that it costs more to "
        "hold at their means the neurons of the experts with most of them than those of random experts, and "
        "the most predictive neurons than random ones, as many each time; 95% intervals over test examples "
        "and draws."
    )
    return Table(columns, tuple(rows), caption)


def _held_gap(runs: Sequence[Mapping[str, Any]], what: str) -> Interval:
    """Random less chosen, over draws and examples, where `what` (experts, neurons) are held at means."""
    differences: list[np.ndarray] = []
    for run in runs:

        def right(label: str, run: Mapping[str, Any] = run) -> np.ndarray:
            return np.isin(np.arange(run["rows"]), run["correct"][label]).astype(float)

        controls = [right(label) for label in run["correct"] if label.startswith(f"random {what}")]
        differences += [control - right(what) for control in controls]
    return bootstrap(100 * np.array(differences))


def modules_figure(found: Found, names: Sequence[str], seeds: Sequence[int], path: Path) -> None:
    """What holding a task's experts at their means costs beyond random ones, and its single neurons."""
    runs = {name: [found["modules"][name, seed] for seed in seeds] for name in names}
    bars = {
        f"{what}: random less the task's": [_held_gap(runs[name], what) for name in names]
        for what in ("experts", "neurons")
    }
    title = "Neurons held at their means: the task's experts and neurons beside random ones"
    interval_bars(path, title, names, bars, "points of test accuracy, with 95% intervals")


def stability_table(
    found: Found, names: Sequence[str], seeds: Sequence[int], parts: Sequence[float]
) -> Table:
    """A row a task: how alike predictivities are from one checkpoint of the prompt to the next."""
    steps = [f"{one:.0%} to {two:.0%}" for one, two in zip((0.0, *parts), (*parts, 1.0))]
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        runs = [found["modules"][name, seed]["stability"] for seed in seeds]
        for what in runs[0]:
            each = np.mean([run[what] for run in runs], 0)
            rows.append((name, what, *(round(float(value), 2) for value in each)))
    caption = (
        "Rank correlation of predictivities between checkpoints of the prompt's training, in the mean over "
        "layers: of single neurons, of experts' means, and of the means of random groups as large."
    )
    return Table(("task", "of", *steps), tuple(rows), caption)


def perturbation_figure(found: Found, names: Sequence[str], seeds: Sequence[int], path: Path) -> None:
    """Accuracy against the share of neurons with noise: skill beside random, mean over tasks."""
    fractions = [what.split("/")[1] for what in changes(found, ("noise",))]
    lines: dict[str, list[list[float]]] = {"skill neurons": [], "random neurons": []}
    for seed in seeds:
        pairs = [
            [gap(found, name, [seed], f"noise/{fraction}")[:2] for name in names] for fraction in fractions
        ]
        for number, title in enumerate(lines):
            lines[title].append([fmean(pair[number] for pair in at) for at in pairs])
    whole = 100 * fmean(found["trial"][name, seed]["accuracy"] for name in names for seed in seeds)
    axes = ("share of each layer's neurons with noise, %", "test accuracy, %, mean over tasks")
    shares = [100 * float(each) for each in fractions]
    curves(path, "Noise in skill neurons and in random ones", shares, lines, axes, {"no noise": whole})


def neuron_figure(values: Mapping[str, Any], path: Path) -> None:
    """The talk's figure: one neuron's activations for the test texts of each label."""
    layer, position, neuron, *_ = values["top"]
    by_label = {f"label {label}": np.asarray(each) for label, each in values["values"].items()}
    title = f"{values['task']}: layer {layer}, neuron {neuron}, at the prompt's place {position}"
    label_histograms(path, title, by_label, values["threshold"])


def _verdicts(
    found: Found,
    names: Sequence[str],
    seeds: Sequence[int],
    measured: Sequence[int],
    spearman_row: tuple[Cell, ...],
) -> list[str]:
    trials = found["trial"]
    lines = []
    for name in names:
        top, tuned, low = (
            100 * fmean(trials[name, seed][key] for seed in seeds)
            for key in ("top_test", "balanced", "shuffled_top_test")
        )
        lines.append(
            f"{name}: the best neuron reaches {top:.1f}%, the tuned prompt {tuned:.1f}% (balanced), "
            f"a neuron chosen by shuffled labels {low:.1f}%."
        )
    lines += [_cost_line(found, names, measured, what) for what in changes(found, ("noise", "mean"))]
    _, same, different, p, *_ = spearman_row
    lines.append(f"Predictivities correlate by {same} within kinds and {different} between them (p = {p}).")
    return lines


def _cost_line(found: Found, names: Sequence[str], seeds: Sequence[int], what: str) -> str:
    """On how many tasks a change costs more, or less, where neurons are skill neurons."""
    gaps = {name: gap(found, name, seeds, what).interval for name in names}
    more = [name for name, each in gaps.items() if each.low > 0]
    less = [name for name, each in gaps.items() if each.high < 0]
    kind, fraction = what.split("/")
    change = {"noise": "Noise in", "mean": "Means in place of"}[kind]
    return (
        f"{change} {float(fraction):.0%} of the neurons costs more where they are skill neurons on "
        f"{len(more)} of {len(names)} tasks ({', '.join(more) or 'none'}), less on {len(less)} "
        f"({', '.join(less) or 'none'}), by 95% intervals."
    )
