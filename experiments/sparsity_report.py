"""What `modicum sparsity` says: tables by layer and data set, figures, and those of the converted model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np

from ..models.moefied import MoefiedMLP
from ..research.sparsity.coactivation import coactivation_rows
from ..research.sparsity.mass import SHARES, LayerMass, mass_rows
from ..research.sparsity.moefication import Moefied
from ..research.sparsity.relufication import Relufied
from ..research.sparsity.statistics import ActivationStatistics
from ..research.sparsity.storage import save_statistics
from ..research.sparsity.survey import Surveyed
from ..research.study.figures import Axis, Line, bar_plot, cdf_plot, line_plot
from ..research.study.report import Card, Figure, Report, Section
from ..research.study.tables import Table

LAYERS = 8  # that are drawn, evenly spread


@dataclass(frozen=True)
class Measured:
    """What was found by data set, and what was made of the model.

    With a relufied model these are of that one; `was` are the statistics of the model it was made from.
    """

    name: str
    surveys: Mapping[str, Surveyed]
    moefied: Moefied | None = None
    relufied: Relufied | None = None
    was: ActivationStatistics | None = None

    @cached_property
    def all(self) -> Surveyed:
        """What was found over all data sets."""
        return reduce(Surveyed.merge, self.surveys.values())

    @property
    def tables(self) -> dict[str, Table]:
        """The tables by the names of their files."""
        whole, mass = self.all
        tables = {"activation": activation_table(whole), "mass": mass_table(mass)}
        if len(self.surveys) > 1:
            tables["data"] = data_table({name: one.active for name, one in self.surveys.items()})
        if whole.layers[0].together is not None:
            tables["pairs"] = pairs_table(whole)
        if self.relufied is not None:
            tables["relufied"] = relufied_table(self.relufied)
        if self.was is not None:
            tables["silenced"] = silenced_table(self.was, whole)
        if self.moefied is not None:
            tables["moefied"] = moefied_table(self.moefied)
        return tables


def write_measured(folder: Path | None, measured: Measured) -> str:
    """The tables as text; with `folder` also as files there, with the statistics and `report.html`."""
    tables, found = measured.tables, measured.all.active
    if folder is not None:
        for label, table in tables.items():
            table.write(folder / "tables", label)
        save_statistics(folder / "activations.safetensors", found)
        page(measured, tables).write(folder / "report.html")
    said = [f"{table.caption}\n\n{table.markdown()}" for table in tables.values()]
    said.append(
        f"On the mean token {found.active_ratio:.1%} of the neurons are active; "
        f"{found.fraction_of_inputs_below(0.05):.1%} of (token, layer) pairs activate less than 5%; "
        f"{found.ever_active:.1%} of the neurons fire for some token."
    )
    return "\n".join(said)


def data_table(parts: Mapping[str, ActivationStatistics]) -> Table:
    """A row a data set, by the name of its file where no other has it too."""
    short = [Path(name).name for name in parts]
    rows = [
        {
            "data": Path(name).name if short.count(Path(name).name) == 1 else name,
            "tokens": found.layers[0].tokens,
            "active": found.active_ratio,
            "nonzero": found.nonzero_ratio,
            "inputs below 5%": found.fraction_of_inputs_below(0.05),
            "dead": found.dead,
            "ever active": found.ever_active,
        }
        for name, found in parts.items()
    ]
    return _table(rows, "By data set, over all layers.")


def pairs_table(found: ActivationStatistics) -> Table:
    """A row a layer: which neurons fire together."""
    caption = (
        "Pairs: φ is the correlation over tokens of two neurons' being active; *by chance* about its mean "
        "size if all fired on their own."
    )
    return _table(coactivation_rows(found.layers), caption)


def relufied_table(made: Relufied) -> Table:
    """What the model scores before and after its activation function was changed: a row a state."""
    states = {"as it was": made.before, "changed, untrained": made.swapped, "trained": made.after}
    rows = [{"model": state, **scores} for state, scores in states.items()]
    text = "Loss in nats a token and next-token accuracy"
    body = (
        "Of the last hidden states, token by token, to those of the model as it was: the squared distance "
        "as a share of their squared size, and the cosine; *same neighbour*: of how many rows the nearest "
        "other row by mean hidden state is the same"
    )
    what = text if "loss" in made.after else body
    return _table(rows, f"{what}; on the measured rows, which were not trained on.")


def silenced_table(was: ActivationStatistics, now: ActivationStatistics) -> Table:
    """A row a layer: the active share before and after another activation function."""
    rows = [
        {
            "layer": one.name,
            "active before": one.active_ratio,
            "nonzero before": one.nonzero_ratio,
            "active after": other.active_ratio,
            "nonzero after": other.nonzero_ratio,
            "dead after": len(other.dead),
        }
        for one, other in zip(was.layers, now.layers, strict=True)
    ]
    return _table(rows, "The same rows read by the model as it was (before) and by the trained one (after).")


def activation_table(found: ActivationStatistics) -> Table:
    """A row a layer: which share of the neurons is active."""
    what = "of a size above" if found.sizes else "above"
    caption = f"Active: {what} {found.threshold:g}; {found.layers[0].tokens:,} tokens."
    rows = [{name: value for name, value in row.items() if name != "tokens"} for row in found.rows()]
    return _table(rows, caption)


def mass_table(mass: Sequence[LayerMass]) -> Table:
    """A row a layer: how much of the sum of sizes the largest neurons of a token hold."""
    return _table(mass_rows(mass), "Mass: the share of the sum of sizes; means over tokens.")


def moefied_table(made: Moefied) -> Table:
    """A row a converted layer: what the chosen experts keep."""
    choice = made.model.config.mlp
    assert isinstance(choice, MoefiedMLP)
    flops = choice.selection.flops(made.model.config.width, choice.experts)
    matrices = 3 if choice.gated else 2
    router = flops / (2 * matrices * made.model.config.width * choice.width)
    caption = (
        f"{choice.chosen} of {choice.experts} experts of {choice.width // choice.experts} neurons: "
        f"{choice.share:.1%} of the feed-forward products, and {router:.1%} for the router. Means over "
        f"tokens that were held out."
    )
    return _table(made.rows(), caption)


def page(measured: Measured, tables: Mapping[str, Table]) -> Report:
    """The page with all of it."""
    found = measured.all.active
    first = [tables[name] for name in ("activation", "data") if name in tables]
    sections = [
        Section("Which neurons fire", (), first, activation_figures(found)),
        Section("How mass is spread", (), [tables["mass"]], [mass_figure(measured.all.mass)]),
    ]
    if "pairs" in tables:
        sections.append(Section("Which fire together", (), [tables["pairs"]], []))
    if "relufied" in tables:
        changed = [tables[name] for name in ("relufied", "silenced") if name in tables]
        drawn = [] if measured.was is None else [silenced_figure(measured.was, found)]
        sections.append(Section("With another activation function", (), changed, drawn))
    if measured.moefied is not None:
        figures = [moefied_figure(measured.moefied)]
        sections.append(Section("In experts", (), [tables["moefied"]], figures))
    return Report(
        title="Activation sparsity",
        summary=f"{measured.name}, layer by layer, on {', '.join(measured.surveys)}.",
        cards=[
            Card("Active", f"{found.active_ratio:.1%}", "of the neurons, on the mean token"),
            Card("Below 5%", f"{found.fraction_of_inputs_below(0.05):.1%}", "of (token, layer) pairs"),
            Card("Ever active", f"{found.ever_active:.1%}", "of the neurons fire for some token"),
        ],
        sections=sections,
    )


def activation_figures(found: ActivationStatistics) -> list[Figure]:
    """The distribution over tokens, how often each neuron fires, and a bar a layer."""
    shown = _drawn(found.layers)
    most = max(layer.ratios[np.flatnonzero(layer.histogram)[-1]] for layer in shown)
    ratios = np.linspace(0.0, min(1.0, 1.05 * most), 201)
    curves = [
        Line(
            _short(layer.name),
            ratios.tolist(),
            [np.interp(ratios, layer.ratios, layer.cumulative).tolist()],
        )
        for layer in shown
    ]
    share = Axis("share of a layer's neurons that is active")
    often = {_short(layer.name): layer.frequency.tolist() for layer in shown}
    bars = {_short(layer.name): [layer.active_ratio] for layer in found.layers}
    return [
        Figure(
            line_plot("Active neurons of a token", share, Axis("share of tokens at or below"), curves),
            "Cumulative distribution over tokens of the share of neurons that fire.",
        ),
        Figure(
            cdf_plot("How often a neuron fires", Axis("share of tokens that activate it"), often),
            "Cumulative distribution over neurons.",
        ),
        Figure(bar_plot("Active neurons by layer", Axis("share of neurons"), bars)),
    ]


def silenced_figure(was: ActivationStatistics, now: ActivationStatistics) -> Figure:
    """Which share is not exactly 0 by layer, before and after."""
    layers = list(range(len(now.layers)))
    lines = [
        Line(name, layers, [[layer.nonzero_ratio for layer in found.layers]])
        for name, found in (("as it was", was), ("with another function, trained", now))
    ]
    title = "Neurons that are not exactly 0"
    return Figure(line_plot(title, Axis("layer"), Axis("share of neurons"), lines))


def mass_figure(mass: Sequence[LayerMass]) -> Figure:
    """The share of the mass that the largest neurons hold."""
    lines = [Line(_short(layer.name), list(SHARES), [layer.held.tolist()]) for layer in _drawn(mass)]
    x = Axis("largest neurons of each token, as a share of all")
    return Figure(line_plot("Mass of the largest neurons", x, Axis("share of the mass"), lines))


def moefied_figure(made: Moefied) -> Figure:
    """What the router captures, by layer, below what the best choice of the same experts would."""
    names = list(range(len(made.kept)))
    best = Line("best choice", names, [[one.best for one in made.kept.values()]])
    own = Line("router", names, [[one.mass for one in made.kept.values()]])
    caption = "Share of the activation mass that the chosen experts hold, on tokens that were held out."
    return Figure(line_plot("Captured mass", Axis("layer"), Axis("share of the mass"), [best, own]), caption)


def _table(rows: Sequence[dict[str, Any]], caption: str) -> Table:
    return Table(tuple(rows[0]), tuple(tuple(row.values()) for row in rows), caption)


def _drawn(layers: Sequence[Any]) -> Sequence[Any]:
    return layers[:: max(1, -(-len(layers) // LAYERS))]


def _short(path: str) -> str:
    """`layers_3/mlp/act` as `layer 3`."""
    return path.rpartition("/mlp/")[0].replace("layers_", "layer ").replace("/", " ")
