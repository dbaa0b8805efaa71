"""Deltas switched on and off: pure functions on variables.

A delta is an ordinary argument of a compiled function, so another task's variables of the same shapes, and
the same ones by another factor, run the same program. Variables without an entry are another tree, which
compiles once more; those scaled by 0 are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ... import InputError
from .attach import Tuned
from .trees import PARTS, Tree, from_places, places, variables_by_place

Variables = Mapping[str, Any]


def only(variables: Variables, names: str | Iterable[str]) -> dict[str, Tree]:
    """The variables of the entries `names` (`lora` or `~lora`) alone: all others are disabled.

    Raises `InputError` for a name that no entry has.
    """
    return _kept(variables, known_names(variables, names))


def without(variables: Variables, names: str | Iterable[str]) -> dict[str, Tree]:
    """The variables of all entries but `names`, which are disabled; `InputError` as in `only`."""
    return _kept(variables, entry_names(variables) - known_names(variables, names))


def scaled(tuned: Tuned, variables: Variables, factors: Mapping[str, Any]) -> dict[str, Any]:
    """Variables whose entries act `factors[name]` times as strongly; 0 is the backbone, 1 changes nothing.

    Factors may be traced: no new one compiles anything. Raises `InputError` for a name that no entry has,
    and for a method whose effect is linear in none of its variables.
    """
    by_name = {name: factor for given, factor in factors.items() for name in known_names(variables, given)}
    methods = {entry.name: entry.method for entry in tuned.entries}
    trained = {
        (path, name): methods[name].scaled(own, by_name[name]) if name in by_name else own
        for (path, name), own in places(variables["delta"]).items()
    }
    return {**variables, "delta": from_places(trained)}


def entry_names(variables: Variables) -> set[str]:
    """The names of the entries that have variables, `~lora` and the like."""
    return {name for _, name in variables_by_place(variables)}


def known_names(variables: Variables, names: str | Iterable[str]) -> set[str]:
    """`names` with their `~`; raises `InputError` for one that no entry has."""
    known = entry_names(variables)
    wanted = {f"~{name.removeprefix('~')}" for name in ([names] if isinstance(names, str) else names)}
    if unknown := sorted(wanted - known):
        raise InputError(
            f"no delta is called {unknown[0].removeprefix('~')!r}; there are {', '.join(sorted(known))}"
        )
    return wanted


def _kept(variables: Variables, names: set[str]) -> dict[str, Tree]:
    return {
        part: from_places(
            {place: own for place, own in places(variables.get(part, {})).items() if place[1] in names}
        )
        for part in PARTS
    }
