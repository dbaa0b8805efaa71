"""What `modicum sparsity` says: a table a layer, figures, and the converted model's table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..models.moefied import MoefiedMLP
from ..research.sparsity.mass import SHARES, LayerMass, mass_rows
from ..research.sparsity.moefication import Moefied
from ..research.sparsity.statistics import ActivationStatistics
from ..research.sparsity.storage import save_statistics
from ..research.study.figures import Axis, Line, bar_plot, cdf_plot, line_plot
from ..research.study.report import Card, Figure, Report, Section
from ..research.study.tables import Table

LAYERS = 8  # that are drawn, evenly spread


def write_measured(
    folder: Path | None,
    name: str,
    found: ActivationStatistics,
    mass: Sequence[LayerMass],
    made: Moefied | None,
) -> str:
    """The tables as text; with `folder` also as files there, with the statistics and `report.html`."""
    tables = {"activation": activation_table(found), "mass": mass_table(mass)}
    if made is not None:
        tables["moefied"] = moefied_table(made)
    if folder is not None:
        for label, table in tables.items():
            table.write(folder / "tables", label)
        save_statistics(folder / "activations.safetensors", found)
        page(name, found, mass, made, tables).write(folder / "report.html")
    said = [f"{table.caption}\n\n{table.markdown()}" for table in tables.values()]
    said.append(
        f"On the mean token {found.active_ratio:.1%} of the neurons are active; "
        f"{found.fraction_of_inputs_below(0.05):.1%} of (token, layer) pairs activate less than 5%; "
        f"{found.ever_active:.1%} of the neurons fire for some token."
    )
    return "\n".join(said)


def activation_table(found: ActivationStatistics) -> Table:
    """A row a layer: which share of the neurons is active."""
    caption = f"Active: above {found.threshold:g}; {found.layers[0].tokens:,} tokens."
    return _table(found.rows(), caption)


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


def page(
    name: str,
    found: ActivationStatistics,
    mass: Sequence[LayerMass],
    made: Moefied | None,
    tables: dict[str, Table],
) -> Report:
    """The page with all of it."""
    sections = [
        Section("Which neurons fire", (), [tables["activation"]], activation_figures(found)),
        Section("How mass is spread", (), [tables["mass"]], [mass_figure(mass)]),
    ]
    if made is not None:
        sections.append(Section("In experts", (), [tables["moefied"]], [moefied_figure(made)]))
    return Report(
        title=f"Activation sparsity of {name}",
        summary="Measured on real tokens of the given texts, layer by layer.",
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
    ratios = np.linspace(0.0, 1.0, 101)
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
    return path.removesuffix("/mlp/act").replace("layers_", "layer ").replace("/", " ")
