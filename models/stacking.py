"""Unrolled parameters to scanned ones and back.

Unrolled layers live under `layers_0`, `layers_1`, ...; scanned ones under `layers` with a leading axis.
With a pattern of period p, scanned layer i is row i // p of `layers/layer_{i mod p}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .. import InputError
from .model import Params


def stack_layers(params: Params, period: int = 1) -> Params:
    """Gather `layers_i` subtrees into `layers`, everywhere in the tree."""
    layers = {name: tree for name, tree in params.items() if name.startswith("layers_")}
    others = {k: _descend(stack_layers, v, period) for k, v in params.items() if k not in layers}
    if not layers:
        return others
    if len(layers) % period:
        raise InputError(f"{len(layers)} layers are not a multiple of the pattern's {period}")
    rows = [layers[f"layers_{index}"] for index in range(len(layers))]
    stacked = [
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows[start::period]) for start in range(period)
    ]
    return {
        **others,
        "layers": stacked[0] if period == 1 else {f"layer_{i}": t for i, t in enumerate(stacked)},
    }


def unstack_layers(params: Params, period: int = 1) -> Params:
    """Spread `layers` into `layers_0`, `layers_1`, ..., everywhere in the tree."""
    others = {k: _descend(unstack_layers, v, period) for k, v in params.items() if k != "layers"}
    if "layers" not in params:
        return others
    stacked = params["layers"]
    parts = [stacked] if period == 1 else [stacked[f"layer_{i}"] for i in range(period)]
    rows = len(jax.tree.leaves(parts[0])[0])
    unrolled = {
        f"layers_{row * period + i}": jax.tree.map(lambda leaf, row=row: leaf[row], part)
        for row in range(rows)
        for i, part in enumerate(parts)
    }
    return {**others, **unrolled}


def _descend(function: Any, value: Any, period: int) -> Any:
    return function(value, period) if isinstance(value, Mapping) else value
