"""Sizes of tiles that were found best, from the table `block_sizes.json`; nothing is measured on the way.

`modicum bench attention --tune` measures and writes the table. An entry is for an implementation, a chip, a
type, a width, a kind of mask and a length, of which all but the first and the last may be "*", for any. `by`
says what was compared: "time", or "bundles", a compiler's static counts for a chip that was not there.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ... import InputError
from .masks import And, Causal, Full, Lengths, Mask, Prefix, Segments, Window

TABLE = Path(__file__).with_name("block_sizes.json")
FIELDS = ("chip", "dtype", "width", "mask")
ANY = "*"


def block_sizes(implementation: str, *, length: int, **found: Any) -> tuple[int, ...] | None:
    """The blocks for a call whose `chip`, `dtype`, `width` and `mask` are `found`, or None without an entry.

    Of the entries that fit, those that name most fields; of these the one for the least length that is at
    least `length`, or where none is, for the greatest.
    """
    fitting = [entry for entry in entries() if _fits(entry, implementation, found)]
    if not fitting:
        return None
    most = max(map(_named, fitting))
    by_length = sorted((entry["length"], entry["blocks"]) for entry in fitting if _named(entry) == most)
    best = next((blocks for reach, blocks in by_length if reach >= length), by_length[-1][1])
    return tuple(best)


def found_fields(dtype: str, width: int, mask: Mask) -> dict[str, Any]:
    """The fields of a call on the present chip, as entries have them."""
    return {"chip": chip(), "dtype": dtype, "width": width_bucket(width), "mask": mask_kind(mask)}


def width_bucket(width: int) -> int:
    """The least of 32, 64, 128 and 256 that holds the width; beyond, the width itself."""
    return next((bucket for bucket in (32, 64, 128, 256) if width <= bucket), width)


def mask_kind(mask: Mask) -> str:
    """`packed`, `window`, `causal`, `full` or `other`: what decides how many tiles a row has."""
    match mask:
        case Segments():
            return "packed"
        case Window():
            return "window"
        case Causal() | Prefix():
            return "causal"
        case Full() | Lengths():
            return "full"
        case And(parts=parts):
            kinds = {mask_kind(part) for part in parts}
            return next((kind for kind in ("packed", "window", "other", "causal") if kind in kinds), "full")
        case _:
            return "other"


def chip() -> str:
    """`cpu`, or the kind of the mesh's devices, or of the first device, as its maker calls it."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return "cpu" if device.platform == "cpu" else device.device_kind


@functools.lru_cache(maxsize=1)
def entries() -> tuple[Mapping[str, Any], ...]:
    """The table."""
    return tuple(read(TABLE))


def read(path: Path) -> list[Mapping[str, Any]]:
    """The entries of a file; raises InputError where it is no such table."""
    try:
        table = json.loads(path.read_text())
        whole = all({"implementation", "length", "blocks", *FIELDS} <= set(entry) for entry in table)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is no table of block sizes: {error}") from None
    if not whole:
        raise InputError(f"{path} is no table of block sizes: an entry lacks a field")
    return table


def with_entry(table: list[Mapping[str, Any]], entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The table with `entry` in the place of one for the same."""
    key = ("implementation", *FIELDS, "length")
    kept = [old for old in table if any(old[name] != entry[name] for name in key)]
    return sorted([*kept, entry], key=lambda e: [str(e[name]).rjust(8) for name in key])


def written(table: list[Mapping[str, Any]]) -> str:
    """The table as JSON, an entry a line."""
    return "[\n" + ",\n".join(f" {json.dumps(entry)}" for entry in table) + "\n]\n"


def _fits(entry: Mapping[str, Any], implementation: str, found: Mapping[str, Any]) -> bool:
    if entry["implementation"] != implementation:
        return False
    return all(entry[name] in (ANY, found[name]) for name in FIELDS)


def _named(entry: Mapping[str, Any]) -> int:
    return sum(entry[name] != ANY for name in FIELDS)
