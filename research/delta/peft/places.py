"""Which addresses name given modules, and what a delta tree holds at each of them.

Adapters name modules of unrolled layers; a delta tree has addresses and stacked layers. This is the way
between: `specification` and `filled` on loading, `taken` on saving.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from .... import InputError
from ..attach import Tuned
from ..methods import LeafMethod, Method, Variables
from ..trees import from_places, places, variables_by_place
from .modules import Base, Module, unrolled

LAYER = re.compile(r"((?:.*/)?)layers_(\d+)/(.+)")


@dataclass(frozen=True)
class Delta:
    """A method with its variables in one of our modules, none of them stacked."""

    method: Method
    variables: Mapping[str, np.ndarray]


Deltas = dict[str, Delta]  # by our unrolled paths


def specification(methods: Mapping[str, Method]) -> dict[str, list[Method]]:
    """Addresses that name exactly these unrolled paths, each with its method."""
    by_method: dict[Method, list[str]] = {}
    for path, method in methods.items():
        by_method.setdefault(method, []).append(path)
    spec: dict[str, list[Method]] = {}
    for method, paths in by_method.items():
        for address in addresses(paths):
            spec.setdefault(address, []).append(method)
    return spec


def addresses(paths: Iterable[str]) -> list[str]:
    """As few addresses as name exactly these paths of unrolled layers, scanned or not."""
    numbers: dict[tuple[str, str], list[int]] = {}
    found: list[str] = []
    for path in paths:
        if match := LAYER.fullmatch(path):
            numbers.setdefault((match[1], match[3]), []).append(int(match[2]))
        else:
            found.append(path)
    tails: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (stem, tail), layers in numbers.items():
        tails.setdefault((stem, tuple(sorted(layers))), []).append(tail)
    layered = [f"{stem}layers_{_range(n)}/{_any_of(names)}" for (stem, n), names in tails.items()]
    return layered + found


def _range(numbers: tuple[int, ...]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return "{" + ",".join(f"{low}-{high}" if high > low else str(low) for low, high in parts) + "}"


def _any_of(names: list[str]) -> str:
    parents = {name.rpartition("/")[0] for name in names}
    if len(names) == 1 or len(parents) > 1:
        return names[0] if len(names) == 1 else f"({'|'.join(names)})"
    parent = parents.pop()
    return f"{parent}/" * bool(parent) + f"({'|'.join(name.rpartition('/')[2] for name in names)})"


def filled(
    variables: Mapping[str, Any], tuned: Tuned, base: Base, deltas: Deltas, leaves: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Initial variables with the values of `deltas` and, by our paths, of whole arrays in `leaves`."""
    hits = tuned.hits(variables, base.params)
    rows = {(path, entry.name): hit.rows for (path, entry), hit in hits.items()}
    wanted = {(path, entry.name): entry for path, entry in hits}
    parts = {}
    for part in ("delta", "delta_state"):
        found = places(variables[part])
        for place, initial in found.items():
            if isinstance(wanted[place].method, LeafMethod):
                found[place] = {"value": jnp.asarray(leaves[place[0]])}
            else:
                layers = [deltas[path].variables for _, path in sorted(unrolled(base, place[0], rows[place]))]
                found[place] = {key: _stack(place, key, layers, initial[key]) for key in initial}
        parts[part] = from_places(found)
    return parts


def _stack(place: tuple[str, str], key: str, layers: list[Mapping[str, np.ndarray]], initial: Any) -> Any:
    """The layers' values, or the initial ones where the adapter has none (a dropout's seed)."""
    if key not in layers[0]:
        return initial
    values = [each[key] for each in layers]
    array = np.stack(values) if initial.ndim > values[0].ndim else values[0]
    if array.shape != initial.shape:
        raise InputError(f"{place[0]}: {key} has shape {list(array.shape)}, not {list(initial.shape)}")
    return jnp.asarray(array)


def taken(tuned: Tuned, variables: Mapping[str, Any], base: Base, what: Callable[[Method], bool]) -> Deltas:
    """What acts at our modules, by unrolled paths, of the methods that `what` picks.

    Raises `InputError` for a module that the published model has no counterpart of, and for two deltas at
    one, which PEFT's adapters cannot have.
    """
    own, found = variables_by_place(variables), Deltas()
    for (path, entry), hit in tuned.hits(variables, base.params).items():
        if not what(entry.method):
            continue
        layers = list(unrolled(base, path, hit.rows))
        if not layers:
            raise InputError(
                f"{path or 'the root'}: {base.architecture} has no one matrix for this module, so "
                f"PEFT can have no {entry.method.name} there"
            )
        for index, name in layers:
            if name in found:
                raise InputError(f"{name}: two deltas at one module; PEFT has one, so combine them first")
            found[name] = Delta(entry.method, _layer(own[path, entry.name], index, base, name))
    return found


def _layer(variables: Variables, index: int, base: Base, path: str) -> dict[str, np.ndarray]:
    stacked = base.sites[path][1] is not None
    return {key: np.asarray(value[index] if stacked else value) for key, value in variables.items()}


def same_for_all(module: Module, own: Mapping[str, Delta], key: str, what: str) -> np.ndarray:
    """The one array that all parts of a module of theirs have; raises `InputError` where they differ."""
    values = [delta.variables[key] for delta in own.values()]
    if len(own) < len(module.parts) or any(not np.array_equal(each, values[0]) for each in values):
        raise InputError(
            f"{module.name}: {what} of its input is one for all of "
            f"{', '.join(part.path for part in module.parts)} in PEFT; here they differ"
        )
    return values[0]
