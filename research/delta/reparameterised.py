"""Deltas that a network makes in training, as the plain ones it makes: `folded` drops the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ... import InputError
from .attach import Tuned
from .joining import names_in_order
from .methods import Variables
from .trees import Place, Tree, from_places, places, variables_by_place


def folded(tuned: Tuned, variables: Mapping[str, Any]) -> tuple[Tuned, dict[str, Tree]]:
    """The same deltas with each re-parameterised prefix and prompt encoder as a plain prefix and prompt.

    They compute the same with far fewer numbers, and are what PEFT stores. Other entries stay as they are.
    Raises `InputError` where there is nothing to fold.
    """
    folds = {entry.name: getattr(entry.method, "folded", None) for entry in tuned.entries}
    if not any(folds.values()):
        raise InputError("folded: no entry is a prefix or prompt that a network makes")
    methods = {entry.name: entry.method for entry in tuned.entries}
    state = {place: set(own) for place, own in places(variables.get("delta_state", {})).items()}
    found: dict[Place, Variables] = {}
    for (path, name), own in variables_by_place(variables).items():
        if fold := folds[name]:
            methods[name], found[path, name] = fold(own)
        else:
            found[path, name] = own
    entries = [replace(entry, method=methods[entry.name]) for entry in tuned.entries]
    names = names_in_order([entries])[0]
    parts: dict[str, dict[Place, Variables]] = {"delta": {}, "delta_state": {}}
    for (path, name), made in found.items():
        fixed = state.get((path, name), set())
        parts["delta"][path, names[name]] = {key: made[key] for key in made if key not in fixed}
        parts["delta_state"][path, names[name]] = {key: made[key] for key in made if key in fixed}
    entries = [replace(entry, name=names[entry.name]) for entry in entries]
    return replace(tuned, entries=tuple(entries)), {part: from_places(each) for part, each in parts.items()}
