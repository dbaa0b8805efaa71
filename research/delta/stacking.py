"""A delta of scanned layers as one of unrolled layers, and back: the variables move with their layers.

Addresses say the same in both forms, so the entries stay. With a pattern of period p, layer i is row i // p
of `layers/layer_{i mod p}`, see `models.stacking`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from ... import InputError
from ...models.stacking import stack_layers
from ...models.transformer import Transformer
from .addresses import Hit, stack
from .attach import Entry, Tuned
from .folding import spans
from .methods import LeafMethod, Variables
from .trees import PARTS, Place, Tree, from_places, places

STACKED = re.compile(r"(?P<stack>(?:.*/)?layers)(?:/layer_(?P<slot>\d+))?(?P<rest>(?:/.*)?)")
NUMBERED = re.compile(r"(?P<stack>(?:.*/)?layers)_(?P<layer>\d+)(?P<rest>(?:/.*)?)")


def unstack_delta(
    tuned: Tuned, variables: Mapping[str, Any], params: Mapping[str, Any]
) -> tuple[Tuned, dict[str, Tree]]:
    """The delta of a scanned Transformer as one of the same Transformer unrolled.

    `params` are the scanned ones, arrays or shapes. Raises `InputError` for another model, and for a method
    that keeps something of a stack as a whole.
    """
    model = _transformer(tuned)
    hits = {(path, entry.name): (entry, hit) for (path, entry), hit in tuned.hits(variables, params).items()}
    spread: dict[str, dict[Place, Variables]] = {part: {} for part in PARTS}
    for part in PARTS:
        for place, own in places(variables.get(part, {})).items():
            entry, hit = hits[place]
            spread[part] |= _rows(place, entry, hit, own, params)
    flat = replace(model, config=replace(model.config, scan=False))
    return replace(tuned, model=flat), {part: from_places(found) for part, found in spread.items()}


def stack_delta(
    tuned: Tuned, variables: Mapping[str, Any], params: Mapping[str, Any]
) -> tuple[Tuned, dict[str, Tree]]:
    """The delta of an unrolled Transformer as one of the same Transformer with scanned layers.

    `params` are the unrolled ones, arrays or shapes. Raises `InputError` as `unstack_delta`, and where the
    layers of an entry have unlike shapes or the address names one that has no variables.
    """
    model = _transformer(tuned)
    period = model.config.period
    entries = {entry.name: entry for entry in tuned.entries}
    gathered: dict[str, dict[Place, Variables]] = {part: {} for part in PARTS}
    found: dict[Place, list[int]] = {}
    for part in PARTS:
        rows: dict[Place, dict[int, Variables]] = {}
        for (path, name), own in places(variables.get(part, {})).items():
            if match := NUMBERED.fullmatch(path):
                _require_by_layer(path, entries[name], own)
                layer = int(match["layer"])
                slot = f"/layer_{layer % period}" if period > 1 else ""
                place = f"{match['stack']}{slot}{match['rest']}", name
                rows.setdefault(place, {})[layer // period] = own
            else:
                gathered[part][path, name] = own
        gathered[part] |= {place: _stacked(place, each) for place, each in rows.items()}
        found |= {place: sorted(each) for place, each in rows.items()}
    scanned = replace(tuned, model=replace(model, config=replace(model.config, scan=True)))
    made = {part: from_places(each) for part, each in gathered.items()}
    shapes = jax.eval_shape(lambda tree: stack_layers(tree, period), dict(params))
    _require_rows(scanned, found, made, shapes)
    return scanned, made


def _rows(
    place: Place, entry: Entry, hit: Hit, own: Variables, params: Mapping[str, Any]
) -> dict[Place, Variables]:
    """One place of a stack as a place for each of its layers; any other place as it is."""
    path, name = place
    match = STACKED.fullmatch(path)
    rows, period = stack(params, match["stack"]) if match else (0, 1)
    if not match or not rows:
        return {place: own}
    _require_by_layer(path, entry, own)
    slot = int(match["slot"] or 0)
    return {
        (f"{match['stack']}_{row * period + slot}{match['rest']}", name): jax.tree.map(
            lambda leaf, index=index: leaf[index], own
        )
        for index, row in enumerate(range(rows) if hit.rows is None else hit.rows)
    }


def _stacked(place: Place, by_row: Mapping[int, Variables]) -> Variables:
    own = [by_row[row] for row in sorted(by_row)]
    try:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)
    except (ValueError, TypeError):
        raise InputError(
            f"{place[0]}/{place[1]}: the layers' variables have unlike shapes, and a stack has one shape"
        ) from None


def _require_by_layer(path: str, entry: Entry, own: Variables) -> None:
    """Site methods keep each layer's variables apart; of leaf methods those do that are like their array."""
    method = entry.method
    if isinstance(method, LeafMethod) and (other := sorted(set(own) - set(method.alike))):
        raise InputError(
            f"{path}: {type(method).__name__} keeps {other[0]!r} for all layers of a stack together; its "
            f"delta does not change its form"
        )


def _require_rows(
    tuned: Tuned, found: Mapping[Place, list[int]], made: Mapping[str, Any], params: Mapping[str, Any]
) -> None:
    """A stack must hold just the rows that the address names: others would be taken for wrong layers."""
    for (path, entry), hit in tuned.hits(made, params).items():
        rows = found.get((path, entry.name))
        match = STACKED.fullmatch(path)
        if rows is None or not match:
            continue
        wanted = list(range(stack(params, match["stack"])[0])) if hit.rows is None else list(hit.rows)
        if rows != wanted:
            raise InputError(
                f"{path}/{entry.name}: {entry.address.text!r} names rows {spans(wanted)} of the stack, the "
                f"delta has {spans(rows)}"
            )


def _transformer(tuned: Tuned) -> Transformer:
    if not isinstance(tuned.model, Transformer):
        raise InputError(f"{type(tuned.model).__name__} is no Transformer: how its layers stack is not known")
    return tuned.model
