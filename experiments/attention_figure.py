"""The picture of docs/kernels.md: who computes what of an attention on a mesh.

python -m modicum.experiments.attention_figure docs/figures/attention_on_a_mesh.svg
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..models.kernels.blocks import PARTIAL, SKIP, Grid, static_blocks
from ..models.kernels.masks import Causal
from ..parallel.zigzag import Order, zigzag_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#4477aa", "#ee6677", "#228833", "#998811", "#3399bb", "#aa3377", "#555555", "#bb6611")
"""Of devices, dark enough for white numbers; these tell them apart where colours do not."""
SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "attention", "font.size": 9}
CHUNKS = 8


def owners(devices: int, order: Order) -> np.ndarray:
    """Which device holds each of `CHUNKS` chunks of a sequence."""
    held = zigzag_order(CHUNKS, devices) if order == "zigzag" else np.arange(CHUNKS)
    found = np.empty(CHUNKS, int)
    found[held] = np.arange(CHUNKS) // (CHUNKS // devices)
    return found


def work(devices: int, order: Order) -> list[float]:
    """Tiles of a causal mask that each device computes, in whole tiles: on the diagonal half is seen."""
    tiles = static_blocks(Causal(), Grid(8 * CHUNKS, 8 * CHUNKS, 8, 8))
    rows = np.where(tiles == SKIP, 0.0, np.where(tiles == PARTIAL, 0.5, 1.0)).sum(1)
    return [float(rows[owners(devices, order) == device].sum()) for device in range(devices)]


def draw(path: Path) -> None:
    """Write the figure to `path`, SVG or PNG by its ending."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings: Any = SETTINGS
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(10.5, 3.9), layout="constrained")
        FigureCanvasAgg(figure)
        held, contiguous, zigzag = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
        _held(held)
        _tiles(contiguous, "contiguous")
        _tiles(zigzag, "zigzag")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


def _held(axes: Axes) -> None:
    """q on data=2, context=2, tensor=2: rows of the batch, chunks of the sequence, two blocks of heads."""
    chunks = owners(2, "zigzag")
    for row in range(2):
        for column, part in enumerate(chunks):
            for heads in range(2):
                device = 4 * row + 2 * int(part) + heads
                _cell(axes, column, 2.4 * row + heads, device, str(device))
        axes.text(-0.4, 2.4 * row + 1, f"row {row}", ha="right", va="center")
        for heads in range(2):
            axes.text(
                CHUNKS + 0.15, 2.4 * row + heads + 0.5, f"heads {2 * heads}, {2 * heads + 1}", va="center"
            )
    axes.set(xlim=(-2, CHUNKS + 2.6), ylim=(5.6, -0.4), title="q on data=2, context=2, tensor=2")
    axes.text(CHUNKS / 2, 5.0, "chunks of the sequence, early to late; in a cell its device", ha="center")
    axes.axis("off")


def _tiles(axes: Axes, order: Order) -> None:
    """The live tiles of a causal mask by who computes them, on context=4."""
    found = owners(4, order)
    for query in range(CHUNKS):
        for key in range(query + 1):
            _cell(axes, key, query, int(found[query]), "◪" if key == query else "")
    shares = ", ".join(f"{share:g}" for share in work(4, order))
    axes.set(xlim=(-0.3, CHUNKS + 0.3), ylim=(CHUNKS + 0.3, -0.3), title=f"context=4, {order}")
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks(np.arange(CHUNKS) + 0.5, [f"{device}" for device in found])
    axes.set_ylabel("device of the queries")
    axes.set_xlabel(f"keys\ntiles a device: {shares}")


def _cell(axes: Axes, x: float, y: float, device: int, text: str) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), 0.94, 0.94, color=COLOURS[device]))
    axes.text(x + 0.47, y + 0.47, text, ha="center", va="center", color="white")


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
