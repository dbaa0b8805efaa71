"""Sweeps: lists of overrides, combined by a few functions and laid over a frozen dataclass.

    sweep = product(grid(rank=[2, 4, 8]), chain(grid(method=["lora"]), grid(method=["adapter"], width=[16])))
    configs = [apply(base, overrides) for overrides in prefix("delta", sweep)]

An override maps a dotted field name to its value. The combinators follow Simply's `utils/sweep.py`
(google-deepmind/simply): a sweep is plain data, so it can be printed, cut and concatenated.
"""

import dataclasses
import difflib
import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ... import InputError

Overrides = dict[str, Any]
Sweep = list[Overrides]
Config = TypeVar("Config")


def grid(fields: Mapping[str, Sequence[Any]] | None = None, /, **more: Sequence[Any]) -> Sweep:
    """Every combination of the listed values, the last field fastest. Dotted names go in a mapping."""
    listed = {**(fields or {}), **more}
    return product(*([{name: value} for value in values] for name, values in listed.items()))


def product(*sweeps: Sweep) -> Sweep:
    """Every combination of one override from each sweep; the last sweep varies fastest."""
    return [_union(combination) for combination in itertools.product(*sweeps)]


def chain(*sweeps: Sweep) -> Sweep:
    """One sweep after the other."""
    return [dict(overrides) for sweep in sweeps for overrides in sweep]


def zip_(*sweeps: Sweep) -> Sweep:
    """The first overrides of all sweeps together, then the second; InputError where the lengths differ."""
    lengths = [len(sweep) for sweep in sweeps]
    if len(set(lengths)) > 1:
        raise InputError(f"zip_: the sweeps have {lengths} entries; they must have equally many")
    return [_union(together) for together in zip(*sweeps)]


def prefix(name: str, sweep: Sweep) -> Sweep:
    """The same sweep for the dataclass in field `name`."""
    return [{f"{name}.{field}": value for field, value in overrides.items()} for overrides in sweep]


def subsample(sweep: Sweep, count: int, seed: int = 0) -> Sweep:
    """`count` entries drawn without replacement, in their original order (all, where there are no more)."""
    if count < 1:
        raise InputError(f"subsample: count is {count}; it must be at least 1")
    chosen = random.Random(seed).sample(range(len(sweep)), min(count, len(sweep)))
    return [dict(sweep[index]) for index in sorted(chosen)]


def apply(config: Config, overrides: Mapping[str, Any], _where: str = "") -> Config:
    """A copy of a (nested) dataclass with the given fields replaced; an unknown name raises InputError.

    Each dataclass is rebuilt once, so that its own checks see all of its new values together; a field that is
    replaced as a whole is replaced before names inside it are.
    """
    new: dict[str, Any] = {}
    inside: dict[str, Overrides] = {}
    for name, value in overrides.items():
        head, dot, rest = name.partition(".")
        _check_field(config, head, _where)
        if dot:
            inside.setdefault(head, {})[rest] = value
        else:
            new[head] = value
    for head, nested in inside.items():
        new[head] = apply(new.get(head, getattr(config, head)), nested, f"{_where}{head}.")
    return dataclasses.replace(config, **new)  # type: ignore[type-var]


def label(overrides: Mapping[str, Any]) -> str:
    """A short name for legends and progress lines: `rank=4, method=lora`, without the dotted prefixes."""
    parts = (f"{name.rpartition('.')[2]}={_short(value)}" for name, value in overrides.items())
    return ", ".join(parts) or "base"


def _union(parts: Sequence[Overrides]) -> Overrides:
    merged: Overrides = {}
    for part in parts:
        if twice := sorted(set(merged) & set(part)):
            raise InputError(f"field {twice[0]!r} is set by two of the combined sweeps; keep it in one")
        merged.update(part)
    return merged


def _check_field(config: Any, name: str, where: str) -> None:
    if not dataclasses.is_dataclass(config):
        raise InputError(f"{where}{name}: {where.rstrip('.')} is {config!r}, which has no fields")
    known = [field.name for field in dataclasses.fields(config) if field.init]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {where}{near[0]}? " if near else ""
        raise InputError(
            f"{where}{name}: {type(config).__name__} has no such field; {hint}its fields: {', '.join(known)}"
        )


def _short(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        return type(value).__name__
    return f"{value:g}" if isinstance(value, float) else str(value)
