"""Figures as inline SVG text: lines with bands over seeds, bars with error bars, distributions, heat maps.

Text and axes take the page's own text colour (`currentColor`), so one figure suits a light and a dark page.
Colours are Okabe and Ito's, which colour-blind readers can tell apart (Wong, Nature Methods 8:441, 2011);
beyond six series the line style changes too. No global state of matplotlib is changed.
"""

import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ... import InputError

if TYPE_CHECKING:  # matplotlib takes a second or two to import; tables and run folders do without it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", ":", "-.")
INK = "#010203"  # stands for currentColor until the SVG text is written
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
}


@dataclass(frozen=True)
class Axis:
    """An axis: its label with the unit, and whether it is logarithmic."""

    label: str
    log: bool = False


@dataclass(frozen=True)
class Line:
    """One line: positions `x` and one sequence of values for each seed, each as long as `x`."""

    label: str
    x: Sequence[float]
    runs: Sequence[Sequence[float]]


def line_plot(title: str, x: Axis, y: Axis, series: Sequence[Line]) -> str:
    """Means over seeds as lines, with bands of one standard deviation where there are several seeds."""
    import numpy as np

    _need(title, series)
    with _figure(title, legend=len(series) > 1) as (_, axes, svg):
        for line, (colour, style) in zip(series, _looks()):
            values = np.asarray(line.runs, dtype=float)
            if values.ndim != 2 or values.shape[1] != len(line.x):
                found = [len(run) for run in line.runs]
                raise InputError(
                    f"figure {title!r}: {line.label!r} has {len(line.x)} positions, values {found}"
                )
            mean = values.mean(axis=0)
            marker = "o" if len(line.x) <= 12 else None
            axes.plot(line.x, mean, style, color=colour, label=line.label, marker=marker, markersize=4)
            if len(values) > 1:
                spread = values.std(axis=0, ddof=1)
                axes.fill_between(line.x, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
        _label(axes, x, y)
    return svg[0]


def bar_plot(
    title: str,
    y: Axis,
    bars: Mapping[str, Sequence[float]],
    baselines: Mapping[str, float] | None = None,
) -> str:
    """One bar for each name at the mean of its values (one a seed), error bars of one standard deviation.

    `baselines` are drawn as horizontal lines across all bars and named in the legend.
    """
    import numpy as np

    _need(title, bars)
    for name, values in bars.items():
        if len(values) == 0:
            raise InputError(f"figure {title!r}: bar {name!r} has no values; give at least one a bar")
    means = [float(np.mean(values)) for values in bars.values()]
    spreads = [float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 for values in bars.values()]
    with _figure(title, legend=bool(baselines), grid="y") as (_, axes, svg):
        slots = range(len(bars))
        axes.bar(slots, means, width=0.65, color=PALETTE[0])
        for slot, mean, spread in zip(slots, means, spreads):
            if spread:
                axes.errorbar(slot, mean, yerr=spread, color=INK, capsize=4, linewidth=1.2)
        looks = itertools.islice(_looks(), 1, None)
        for (name, height), (colour, _) in zip((baselines or {}).items(), looks):
            axes.axhline(height, color=colour, linestyle="--", linewidth=1.5, label=name)
        axes.set_xticks(list(slots), [_wrapped(name) for name in bars])
        if len(bars) > 6:
            axes.tick_params(axis="x", rotation=35)
            for text in axes.get_xticklabels():
                text.set_horizontalalignment("right")
        _label(axes, None, y)
    return svg[0]


def cdf_plot(title: str, x: Axis, samples: Mapping[str, Sequence[float]]) -> str:
    """The empirical cumulative distribution of each sample: the share of values at or below x."""
    import numpy as np

    _need(title, samples)
    with _figure(title, legend=len(samples) > 1) as (_, axes, svg):
        for (name, values), (colour, style) in zip(samples.items(), _looks()):
            if len(values) == 0:
                raise InputError(f"figure {title!r}: sample {name!r} is empty; give at least one value")
            ordered = np.sort(np.asarray(values, dtype=float))
            shares = np.arange(1, len(ordered) + 1) / len(ordered)
            xs = np.concatenate([ordered[:1], ordered])
            axes.step(xs, np.concatenate([[0.0], shares]), style, where="post", color=colour, label=name)
        axes.set_ylim(0, 1.02)
        _label(axes, x, Axis("share at or below"))
    return svg[0]


def heat_map(
    title: str,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    x: Axis,
    y: Axis,
    unit: str,
) -> str:
    """A matrix as colours, dark for low and light for high; cells carry their numbers where they fit."""
    import numpy as np

    matrix = np.asarray(values, dtype=float)
    if matrix.shape != (len(rows), len(columns)) or matrix.size == 0:
        raise InputError(
            f"figure {title!r}: values have shape {matrix.shape}, names {(len(rows), len(columns))}"
        )
    height = 1.6 + min(max(0.34 * len(rows), 1.6), 8.0)
    with _figure(title, legend=False, grid=None, height=height) as (figure, axes, svg):
        image = axes.imshow(matrix, cmap="viridis", aspect="auto")
        axes.set_xticks(**_ticks(columns))
        axes.set_yticks(**_ticks(rows))
        bar = figure.colorbar(image, ax=axes, label=unit)
        bar.outline.set_visible(False)
        if matrix.size <= 120 and len(columns) <= 12:
            _write_cells(axes, matrix)
        _label(axes, x, y)
    return svg[0]


@contextmanager
def _figure(
    title: str, legend: bool, grid: str | None = "both", height: float = 3.6
) -> Iterator[tuple["Figure", "Axes", list[str]]]:
    """A figure to draw on; at the end its SVG text is in the yielded list."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    written: list[str] = []
    settings: Any = {**SETTINGS, "svg.hashsalt": title}  # matplotlib types its keys one by one
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(7.0, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        if grid:
            axes.grid(axis=grid)  # type: ignore[arg-type]
        yield figure, axes, written
        axes.set_title(title)
        if legend:
            names = axes.get_legend_handles_labels()[1]
            across = max(1, min(4, 84 // (6 + max(map(len, names)))))
            figure.legend(loc="outside lower left", ncols=across, frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    written.append(_inline(text.getvalue(), title))


def _inline(svg: str, title: str) -> str:
    """The SVG element alone, as wide as its place allows, in the page's colour, named for screen readers."""
    from html import escape
    from re import DOTALL, sub

    element = svg[svg.index("<svg") :].replace(INK, "currentColor")
    element = sub(r'(<svg[^>]*?) width="([\d.]+)pt" height="[\d.]+pt"', r'\1 style="width:\2pt"', element)
    element = sub(r"<metadata>.*?</metadata>\s*", "", element, flags=DOTALL)
    return element.replace("<svg", f'<svg role="img" aria-label="{escape(title, quote=True)}"', 1)


def _looks() -> Iterator[tuple[str, str]]:
    return ((colour, style) for style in itertools.cycle(STYLES) for colour in PALETTE)


def _label(axes: "Axes", x: Axis | None, y: Axis) -> None:
    if x is not None:
        axes.set_xlabel(x.label)
        if x.log:
            axes.set_xscale("log")
            _plain_powers(axes.xaxis)
    axes.set_ylabel(y.label)
    if y.log:
        axes.set_yscale("log")
        _plain_powers(axes.yaxis)


def _plain_powers(axis: Any) -> None:
    """Ticks of a logarithmic axis as plain numbers: matplotlib's are TeX, which is not parsed here."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain())


def _need(title: str, series: Sequence[Any] | Mapping[str, Any]) -> None:
    if len(series) == 0:
        raise InputError(f"figure {title!r}: nothing to draw; give at least one series")


def _wrapped(name: str) -> str:
    """A bar's name over several lines, broken at spaces."""
    import textwrap

    return "\n".join(textwrap.wrap(name, 14, break_long_words=False)) or name


def _ticks(names: Sequence[str]) -> dict[str, Any]:
    """At most 24 evenly spaced tick positions with their names."""
    stride = -(-len(names) // 24)
    return {"ticks": list(range(0, len(names), stride)), "labels": list(names[::stride])}


def _write_cells(axes: "Axes", matrix: Any) -> None:
    low, high = float(matrix.min()), float(matrix.max())
    for row, column in itertools.product(*map(range, matrix.shape)):
        value = matrix[row, column]
        ink = "black" if value > low + 0.6 * (high - low) else "white"
        axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=8, color=ink)
