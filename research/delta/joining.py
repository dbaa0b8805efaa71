"""Several deltas on one backbone as one tuned model: each keeps its methods, addresses and numbers.

tuned, variables = join([(first, its_variables), (second, its_variables)])

The methods of the first act first. Their numbers stay apart: `combination` makes one delta of several.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ... import InputError
from .attach import Entry, Tuned
from .methods import Variables
from .trees import Place, Tree, from_places, places, require_variables

Delta = tuple[Tuned, Mapping[str, Any]]


def join(deltas: Sequence[Delta]) -> tuple[Tuned, dict[str, Tree]]:
    """One tuned model with the entries of all `deltas`, renamed where two have one name, and its variables.

    Raises `InputError` where they belong to different models or exclude different addresses.
    """
    first = require_one_model(deltas)
    renaming = names_in_order(tuned.entries for tuned, _ in deltas)
    entries = [
        replace(entry, name=names[entry.name])
        for (tuned, _), names in zip(deltas, renaming)
        for entry in tuned.entries
    ]
    parts: dict[str, dict[Place, Variables]] = {"delta": {}, "delta_state": {}}
    for (_, variables), names in zip(deltas, renaming):
        require_variables(variables)
        for part, found in parts.items():
            for (path, name), own in places(variables.get(part, {})).items():
                found[path, names[name]] = own
    return replace(first, entries=tuple(entries)), {part: from_places(found) for part, found in parts.items()}


def names_in_order(groups: Iterable[Iterable[Entry]]) -> list[dict[str, str]]:
    """For each group of entries its names, and what they are called in one specification of all groups."""
    counts: Counter[str] = Counter()
    renamed = []
    for entries in groups:
        names = {}
        for entry in entries:
            number = counts[entry.method.name]
            counts[entry.method.name] += 1
            names[entry.name] = f"~{entry.method.name}_{number}" if number else f"~{entry.method.name}"
        renamed.append(names)
    return renamed


def require_one_model(deltas: Sequence[Delta]) -> Tuned:
    """The first delta's tuned model; raises `InputError` where another has another model or `exclude`."""
    if not deltas:
        raise InputError("no delta was given; give one or more as (tuned, variables)")
    first = deltas[0][0]
    for index, (tuned, _) in enumerate(deltas):
        if tuned.model != first.model:
            raise InputError(f"delta {index} is attached to another model than delta 0")
        if tuned.exclude != first.exclude:
            found, wanted = ([each.text for each in t.exclude] for t in (tuned, first))
            raise InputError(
                f"delta {index} has exclude={found}, delta 0 {wanted}; attach them with the same exclude"
            )
    return first
