"""Tuning of the last layers in full ("last-layer tuning", Ding et al., 2023, Nat. Mach. Intell. 5)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from ... import InputError
from .addresses import above_path
from .addresses import stack as stacked
from .attach import Spec
from .folding import near_misses
from .full import Full


def last_layers(params: Mapping[str, Any], count: int = 1, stack: str = "layers") -> Spec:
    """The specification that tunes the last `count` layers of `stack` in full: `{"layers_{10-}": Full()}`.

    `stack` is the name of the layers without their number, unrolled (`layers_3`, `layers/3`) or scanned
    (`layers`). Where several stacks are called so (an encoder's and a decoder's) it is the last layers of
    each; `stack="decoder/layers"` names one. Raises `InputError` if there is no such stack, or fewer layers.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    leaves = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    everything = list(dict.fromkeys(above for path in leaves for above in above_path(path)))
    if not (found := _stacks(params, stack, everything)):
        raise InputError(f"last_layers: no layers are called {stack!r}{near_misses(stack, everything)}")
    spec = {}
    for before, layers in found.items():
        name = before.rstrip("_/")
        if not 1 <= count <= layers:
            raise InputError(f"last_layers: count={count} is not between 1 and the {layers} layers of {name}")
        if inside := [other for other in found if other.endswith(f"/{before}")]:
            raise InputError(f"last_layers: {stack!r} names {name} and {inside[0].rstrip('_/')}; name one")
        spec[f"{before}{{{layers - count}-}}"] = Full()
    return spec


def _stacks(params: Mapping[str, Any], name: str, paths: Sequence[str]) -> dict[str, int]:
    """The layers of each stack called `name`, by what comes before a layer's number in an address."""
    numbered = re.compile(rf"((?:.*/)?{re.escape(name)}[_/])(\d+)")
    found: dict[str, int] = {}
    for path in paths:
        if match := numbered.fullmatch(path):
            found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
    for path in paths:
        unrolled = {f"{path}_", f"{path}/"} & set(found)
        if f"/{path}".endswith(f"/{name}") and not unrolled:
            rows, period = stacked(params, path)
            if rows:
                found[f"{path}_"] = rows * period
    return found
