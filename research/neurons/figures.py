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


def grouped_heat_maps(
    path: Path, maps: Mapping[str, np.ndarray], names: Sequence[str], groups: Sequence[str]
) -> None:
    """Many things' similarities `[N, N]` side by side, without numbers; lines where a new group begins.

    The diagonal is left white, colours span the rest. Things of one group stand beside each other.
    """
    starts = [i for i in range(len(groups)) if i == 0 or groups[i] != groups[i - 1]]
    side = 0.19 * len(names) + 1.6
    with _page(path, len(maps), "", width=side + 1.2, height=side) as page:
        for number, (axes, (title, matrix)) in enumerate(zip(page, maps.items())):
            shown = np.ma.masked_array(np.asarray(matrix, float), np.eye(len(names), dtype=bool))
            drawn = axes.imshow(shown, cmap="viridis", aspect="equal")
            axes.figure.colorbar(drawn, ax=axes, shrink=0.7)
            for start in starts[1:]:
                axes.axhline(start - 0.5, color="white", linewidth=1.2)
                axes.axvline(start - 0.5, color="white", linewidth=1.2)
            axes.set_title(title, fontsize=10)
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
            axes.set_yticks(range(len(names)), names if number == 0 else [""] * len(names), fontsize=7)
            for label, group in zip(axes.get_xticklabels() + axes.get_yticklabels(), [*groups, *groups]):
                label.set_color(_colour(group, groups))


def dendrogram_figure(path: Path, title: str, tree: Any, names: Sequence[str], groups: Sequence[str]) -> None:
    """A tree of scipy's form; names have their group's colour."""
    from scipy.cluster.hierarchy import dendrogram

    with _page(path, 1, title, height=0.19 * len(names) + 1.2) as (axes,):
        dendrogram(tree, labels=list(names), orientation="right", ax=axes, color_threshold=0,
                   above_threshold_color="black", leaf_font_size=8)  # fmt: skip
        nearest, farthest = tree[:, 2].min(), tree[:, 2].max()
        axes.set_xlim(nearest - 0.1 * (farthest - nearest), None)
        of = dict(zip(names, groups))
        for label in axes.get_yticklabels():
            label.set_color(_colour(of[label.get_text()], groups))
        axes.set_xlabel("largest similarity less that of those that meet")
        kinds = _ranked(groups)
        handles = [axes.plot([], [], color=_colour(kind, groups), linewidth=4)[0] for kind in kinds]
        axes.legend(handles, kinds, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def interval_bars(
    path: Path,
    title: str,
    rows: Sequence[str],
    bars: Mapping[str, Sequence[tuple[float, float, float]]],
    label: str,
) -> None:
    """For each row a point of each kind with its interval (mean, low, high); a line at 0."""
    with _page(path, 1, title, height=0.42 * len(rows) + 1.3) as (axes,):
        for number, (name, found) in enumerate(bars.items()):
            mean, low, high = np.asarray(found, float).T
            places = np.arange(len(rows)) + 0.22 * (number - (len(bars) - 1) / 2)
            axes.errorbar(mean, places, xerr=[mean - low, high - mean], fmt="o", markersize=5, capsize=3,
                          color=PALETTE[number % len(PALETTE)], label=name)  # fmt: skip
        axes.axvline(0, color="black", linewidth=1)
        axes.set_yticks(range(len(rows)), rows, fontsize=9)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.legend(frameon=False, fontsize=8)


def _ranked(groups: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(groups))


def _colour(group: str, groups: Sequence[str]) -> str:
    return PALETTE[_ranked(groups).index(group) % len(PALETTE)]


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
