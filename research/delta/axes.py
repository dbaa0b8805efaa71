"""How a delta lies on a mesh: its arrays inherit the logical axes of their site's kernel.

A LoRA's `b [rank, out]` beside a kernel `("width", "heads")` is `(None, "heads")`: under tensor parallelism
each device holds the part for its own heads, and the product needs no more communication than the kernel's.
Arrays of which a method says nothing are copied over the axes that split kernels; ZeRO may split any.
"""

from __future__ import annotations

import re

from ...parallel.rules import AxisTable, Names
from .attach import Entry, Tuned
from .methods import LeafMethod


def delta_axes(tuned: Tuned, table: AxisTable | None) -> AxisTable | None:
    """`table`, the model's axis table, with rows for the delta's arrays in front; None for a model without.

    For trained variables, their optimizer state and what a delta keeps fixed.
    """
    if table is None:
        return None
    return (*(row for entry in tuned.entries for row in _rows(entry, table)), *table)


def _rows(entry: Entry, table: AxisTable) -> list[tuple[str, Names]]:
    """Rows for the variables of one entry, wherever the table names an array that they belong to."""
    method, name = entry.method, re.escape(entry.name)
    if isinstance(method, LeafMethod):
        return [(f"{array}/{name}/{each}", names) for array, names in table for each in method.alike]
    rows: list[tuple[str, Names]] = []
    for array, names in table:
        site = array.removesuffix("/kernel")
        if site == array or len(names) != 2:
            continue  # which axes of a kernel of more are inputs, the table does not say
        of = {"in": names[0], "out": names[1], None: None}
        rows += [
            (f"{site}/{name}/{each}", tuple(of[axis] for axis in axes)) for each, axes in method.axes.items()
        ]
    return rows
