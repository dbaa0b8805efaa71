"""The layers of a stack by number, whether they are unrolled or scanned."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ... import InputError

PLACE = re.compile(r"(?P<head>(?:.*/)?layers)(?:_(?P<number>\d+)|(?P<stacked>))(?:/layer_(?P<slot>\d+))?/.+")


@dataclass(frozen=True)
class Layers:
    """Where layer 0, 1, ... of one kind of site is found: its path, and its row where layers are scanned.

    `join` makes one array `[L, ...]` of what `run_with_cache` returned, `split` makes of such an array what
    a `Given` edit takes.
    """

    places: tuple[tuple[str, int | None], ...]

    @classmethod
    def of(cls, shapes: Mapping[str, Any]) -> Layers:
        """The layers of the sites whose `shapes` (`site_shapes`) are given, one site a layer.

        Raises `InputError` for sites outside layers, of two stacks, several in a layer, or of other shapes.
        """
        found: dict[int, tuple[str, int | None]] = {}
        matched = {path: _match(path) for path in shapes}
        heads = sorted({match["head"] for match in matched.values()})
        if len(heads) != 1:
            raise InputError(f"sites in {len(heads)} stacks ({', '.join(heads)}); name those of one stack")
        period = len({match["slot"] for match in matched.values()})
        for path, match in matched.items():
            if match["number"] is not None:
                rows: list[tuple[int, int | None]] = [(int(match["number"]), None)]
            else:
                count, slot = shapes[path].shape[0], int(match["slot"] or 0)
                rows = [(row * period + slot, row) for row in range(count)]
            for number, row in rows:
                if number in found:
                    raise InputError(f"layer {number} has two of these sites: {found[number][0]} and {path}")
                found[number] = (path, row)
        layers = cls(tuple(found[number] for number in sorted(found)))
        sizes = {layers._shape(shapes, place) for place in layers.places}
        if len(sizes) != 1:
            raise InputError(
                f"layers of different shapes {sorted(sizes)} make no one array; name some of them"
            )
        return layers

    def __len__(self) -> int:
        return len(self.places)

    @property
    def names(self) -> tuple[str, ...]:
        """What each layer's site would be called were the layers not stacked."""
        return tuple(path if row is None else f"{path}[{row}]" for path, row in self.places)

    def join(self, values: Mapping[str, Any]) -> Any:
        """`[L, ...]` of values by path."""
        rows = [values[path] if row is None else _row(values[path], row) for path, row in self.places]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)

    def split(self, array: Any) -> dict[str, Any]:
        """Values by path of `array [L, ...]`, a leaf or a tree of them."""
        order: dict[str, list[int]] = {}
        for number, (path, _) in enumerate(self.places):
            order.setdefault(path, []).append(number)
        stacked = {path for path, row in self.places if row is not None}
        return {
            path: jax.tree.map(
                lambda leaf, path=path, numbers=numbers: (
                    leaf[np.asarray(numbers)] if path in stacked else leaf[numbers[0]]
                ),
                array,
            )
            for path, numbers in order.items()
        }

    @staticmethod
    def _shape(shapes: Mapping[str, Any], place: tuple[str, int | None]) -> tuple[int, ...]:
        path, row = place
        return tuple(shapes[path].shape if row is None else shapes[path].shape[1:])


def is_stacked(path: str) -> bool:
    """Whether the site at `path` is in scanned layers, so that one path stands for all of them."""
    match = PLACE.fullmatch(path)
    return match is not None and match["stacked"] is not None


def _match(path: str) -> re.Match[str]:
    match = PLACE.fullmatch(path)
    if match is None:
        raise InputError(f"{path} is in no layer; sites such as layers_3/mlp/act are")
    return match


def _row(tree: Any, row: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[row], tree)
