"""Figures about neurons, written as PNG: two histograms, similarity heat maps, and what perturbing costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ... import InputError
from ..study.figures import PALETTE

DPI = 110


def label_histograms(
    path: Path, title: str, values: Mapping[str, np.ndarray], threshold: float, bins: int = 40
) -> None:
    """One neuron's activations for the examples of each label, over one another; a line at its baseline."""
    if not values or any(len(each) == 0 for each in values.values()):
        raise InputError(f"{path.name}: a histogram needs examples of every label")
    edges = np.histogram_bin_edges(np.concatenate(list(values.values())), bins)
    with _page(path, 1, title) as (axes,):
        for colour, (label, each) in zip(PALETTE, values.items()):
            axes.hist(each, edges, color=colour, alpha=0.55, label=f"{label} ({len(each)} texts)")
        axes.axvline(
            threshold, color="black", linestyle="--", linewidth=1.2, label="mean over training texts"
        )
        axes.set_xlabel("activation")
        axes.set_ylabel("texts")
        axes.legend(frameon=False)


def heat_maps(
    path: Path, maps: Mapping[str, np.ndarray], rows: Sequence[str], columns: Sequence[str], unit: str = ""
) -> None:
    """Matrices `[N, M]` side by side, each with its own colours; cells carry their numbers.

    Where rows and columns are the same things the diagonal, which would use up the colours, is left white.
    """
    with _page(path, len(maps), unit, width=0.62 * len(columns) + 1.4, height=0.42 * len(rows) + 1.9) as page:
        for number, (axes, (title, matrix)) in enumerate(zip(page, maps.items())):
            if np.shape(matrix) != (len(rows), len(columns)):
                raise InputError(
                    f"{path.name}: {title!r} is {np.shape(matrix)}, names {len(rows), len(columns)}"
                )
            _heat(axes, np.asarray(matrix, float), apart=list(rows) == list(columns))
            axes.set_title(title, fontsize=10)
            axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=8)
            axes.set_yticks(range(len(rows)), rows if number == 0 else [""] * len(rows), fontsize=8)


def curves(
    path: Path,
    title: str,
    x: Sequence[float],
    lines: Mapping[str, Sequence[Sequence[float]]],
    labels: tuple[str, str],
    baselines: Mapping[str, float],
) -> None:
    """Means over runs against `x`, a line each, with bars of one standard deviation."""
    with _page(path, 1, title) as (axes,):
        for number, (name, runs) in enumerate(lines.items()):
            values = np.asarray(runs, float)
            spread = values.std(0, ddof=1) if len(values) > 1 else None
            colour = PALETTE[number % len(PALETTE)]
            axes.errorbar(
                x, values.mean(0), spread, label=name, color=colour, marker="o", markersize=4, capsize=3
            )
        for name, height in baselines.items():
            axes.axhline(height, linestyle="--", linewidth=1.2, color="black", label=name)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.legend(frameon=False, fontsize=8)


def _heat(axes: Any, matrix: np.ndarray, apart: bool) -> None:
    own = np.logical_and(np.eye(len(matrix), matrix.shape[1]), apart and len(matrix) > 1)
    low, high = float(matrix[~own].min()), float(matrix[~own].max())
    axes.imshow(np.ma.masked_array(matrix, own), cmap="viridis", aspect="auto")
    for (row, column), value in np.ndenumerate(matrix):
        dark = not own[row, column] and value <= low + 0.6 * (high - low)
        ink = "white" if dark else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink)


@contextmanager
def _page(
    path: Path, count: int, title: str, width: float = 7.0, height: float = 3.8
) -> Iterator[tuple[Any, ...]]:
    """`count` axes in a row; the figure is written when the block ends."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained")
    FigureCanvasAgg(figure)
    page = tuple(figure.add_subplot(1, count, number + 1) for number in range(count))
    for axes in page if count == 1 else ():
        axes.spines[["top", "right"]].set_visible(False)
    yield page
    if title:
        figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
