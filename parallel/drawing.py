"""Pictures of how arrays lie on a mesh, as SVG: which devices hold which part.

In the manner of `jax.debug.visualize_array_sharding`, for several arrays side by side and for a page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from jax.sharding import Sharding

WIDTH, HEIGHT = 190, 116  # of an array's picture
GAP, TOP, LEFT = 26, 40, 12
COLOURS = ("#8ecae6", "#ffd166", "#95d5b2", "#f4a6a6", "#cdb4db", "#ffb385", "#b5c99a", "#a3b8f0")
STYLE = "font-family='Helvetica, Arial, sans-serif'"


class Drawn(NamedTuple):
    """An array of two axes to draw: its name, shape, the letters of its axes and where it lies."""

    name: str
    shape: tuple[int, int]
    letters: str
    sharding: Sharding


class Tile(NamedTuple):
    """A part of an array, as fractions of its height and width, and the devices that hold it, by number."""

    rows: tuple[float, float]
    columns: tuple[float, float]
    devices: tuple[int, ...]


def tiles(sharding: Sharding, shape: tuple[int, int]) -> list[Tile]:
    """The parts of an array, from its top left corner on; devices are numbered in the order of the mesh."""
    number = {device: index for index, device in enumerate(_order(sharding))}
    held: dict[tuple[tuple[float, float], tuple[float, float]], list[int]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        rows, columns = (
            ((part.start or 0) / size, (size if part.stop is None else part.stop) / size)
            for part, size in zip(index, shape)
        )
        held.setdefault((rows, columns), []).append(number[device])
    return [Tile(rows, columns, tuple(sorted(devices))) for (rows, columns), devices in sorted(held.items())]


def draw(rows: Mapping[str, Sequence[Drawn]]) -> str:
    """One SVG: a row of pictures under each title."""
    columns = max(len(row) for row in rows.values())
    width = LEFT + columns * (WIDTH + GAP)
    height = len(rows) * (HEIGHT + TOP + GAP) + GAP
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' "
        f"viewBox='0 0 {width} {height}' {STYLE}>",
        f"<rect width='{width}' height='{height}' fill='white'/>",
    ]
    for index, (title, row) in enumerate(rows.items()):
        top = GAP + index * (HEIGHT + TOP + GAP)
        parts.append(_text(LEFT, top, title, 14, weight="bold"))
        for column, drawn in enumerate(row):
            parts += _array(drawn, LEFT + column * (WIDTH + GAP), top + TOP - 8)
    return "\n".join([*parts, "</svg>", ""])


def _array(drawn: Drawn, left: float, top: float) -> list[str]:
    letters = ", ".join(f"{letter}={size}" for letter, size in zip(drawn.letters, drawn.shape))
    parts = [_text(left, top - 6, f"{drawn.name}  [{letters}]", 11)]
    for tile in tiles(drawn.sharding, drawn.shape):
        x, y = left + tile.columns[0] * WIDTH, top + tile.rows[0] * HEIGHT
        width = (tile.columns[1] - tile.columns[0]) * WIDTH
        height = (tile.rows[1] - tile.rows[0]) * HEIGHT
        colour = COLOURS[tile.devices[0] % len(COLOURS)]
        parts.append(
            f"<rect x='{x:.1f}' y='{y:.1f}' width='{width:.1f}' height='{height:.1f}' fill='{colour}' "
            f"stroke='white' stroke-width='2'/>"
        )
        label = " ".join(map(str, tile.devices))
        size = max(6.0, min(14.0, height * 0.8, 1.7 * width / max(1, len(label))))
        parts.append(_text(x + width / 2, y + height / 2 + size * 0.35, label, size, anchor="middle"))
    return parts


def _text(
    x: float, y: float, words: str, size: float, *, weight: str = "normal", anchor: str = "start"
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size:.1f}' font-weight='{weight}' "
        f"text-anchor='{anchor}' fill='#222'>{escape(words)}</text>"
    )


def _order(sharding: Sharding) -> list:
    mesh = getattr(sharding, "mesh", None)
    return list(sharding.device_set) if mesh is None else list(mesh.devices.flat)
