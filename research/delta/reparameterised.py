"""Deltas that a network makes in training, as the plain ones it makes: `folded` drops the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ... import InputError
from .attach import Tuned
from .joining import names_in_order
from .trees import PARTS, Tree, from_places, places, variables_by_place


def folded(tuned: Tuned, variables: Mapping[str, Any]) -> tuple[Tuned, dict[str, Tree]]:
    """The same deltas with each re-parameterised prefix and prompt encoder as a plain prefix and prompt.

    They compute the same with far fewer numbers, and are what PEFT stores. Other entries stay as they are.
    Raises `InputError` where there is nothing to fold.
    """
    folds = {entry.name: getattr(entry.method, "folded", None) for entry in tuned.entries}
    if not any(folds.values()):
        raise InputError("folded: no entry is a prefix or prompt that a network makes")
    methods = {entry.name: entry.method for entry in tuned.entries}
    parts = {part: places(variables.get(part, {})) for part in PARTS}
    for (path, name), own in variables_by_place(variables).items():
        if fold := folds[name]:
            methods[name], made = fold(own)
            fixed = parts["delta_state"].get((path, name), {})
            parts["delta"][path, name] = {key: made[key] for key in made if key not in fixed}
            parts["delta_state"][path, name] = {key: made[key] for key in made if key in fixed}
    entries = [replace(entry, method=methods[entry.name]) for entry in tuned.entries]
    names = names_in_order([entries])[0]
    entries = [replace(entry, name=names[entry.name]) for entry in entries]
    return replace(tuned, entries=tuple(entries)), {
        part: from_places({(path, names[name]): own for (path, name), own in found.items()})
        for part, found in parts.items()
    }
