"""Values read at hooks, one entry per layer, whether layers are scanned or not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from ... import InputError

NUMBER = re.compile(r"(\d+)")


def unstacked(values: Mapping[str, Mapping[str, np.ndarray]]) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Layer name and values, by name and number; a stacked path has an axis in front of its `tokens`.

    Row r of `layers/mlp/act` is `layers_r/mlp/act`; where a pattern of p layers repeats, row r of
    `layers/layer_j/mlp/act` is layer r p + j.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for path, value in values.items():
        lead = np.shape(value["tokens"])
        if not lead:
            found[path] = dict(value)
            continue
        match = re.fullmatch(r"((?:.*/)?layers)(?:/layer_(\d+))?(/.*)", path)
        if match is None or len(lead) > 1:
            raise InputError(
                f"{path}: values come stacked as {lead}, and only 'layers' scanned once are understood"
            )
        head, slot, tail = match.groups()
        slots = {
            found_slot[1]
            for each in values
            if (found_slot := re.match(rf"{re.escape(head)}/layer_(\d+)/", each))
        }
        for row in range(lead[0]):
            number = row * max(1, len(slots)) + int(slot or 0)
            found[f"{head}_{number}{tail}"] = jax.tree.map(lambda leaf, row=row: leaf[row], dict(value))
    yield from sorted(found.items(), key=lambda item: _natural(item[0]))


def _natural(path: str) -> list[tuple[int, str | int]]:
    """Sorts `layers_2` before `layers_10`."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in NUMBER.split(path)]
