"""Tiles for our TPU attention ranked by the compiler's instruction bundles, for chips that need not be there.

A kernel is compiled for a mask of which every tile is full, and for one of which every tile is partial; the
bundles that it then has, start and end of a row of tiles included, are what a step costs. A mask's tiles of
each kind at a length, each at its cost, are the rank of a candidate. These are static counts and no times:
waiting, copies and what starting a step costs are not in them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax

from ... import InputError
from .attention_bounds import apart, bundles_of_case, named

if TYPE_CHECKING:
    from ...models.kernels import Mask

MASKS = ("full", "causal")
KERNELS = {
    "tpu forward": "attention_forward",
    "tpu backward": "attention_all_gradients",
    "tpu query gradient": "attention_query_gradient",
    "tpu key gradients": "attention_key_gradients",
}

Tile = tuple[int, int, int]


class Step(NamedTuple):
    """The bundles of a kernel of ours whose tiles are all full, or all partial."""

    chip: str
    kind: str  # as JAX calls the chip
    kernel: str
    tile: Tile
    full: int
    partial: int


def ranked(
    steps: Sequence[Step],
    table: list[Mapping[str, Any]],
    *,
    width: int,
    dtype: str,
    lengths: Sequence[int],
    report: Callable[[str], None] = print,
) -> list[Mapping[str, Any]]:
    """The table with the tile of fewest bundles for each chip, kernel and length; of equals the first."""
    from ...models.kernels.block_sizes import width_bucket, with_entry

    known = {"dtype": dtype, "width": width_bucket(width)}
    for chip, kind, kernel in dict.fromkeys((step.chip, step.kind, step.kernel) for step in steps):
        tried = [step for step in steps if (step.chip, step.kernel) == (chip, kernel)]
        for mask in MASKS:
            for length in lengths:
                counts = {step.tile: bundles(step, mask, length) for step in tried}
                best = min(counts, key=lambda tile: counts[tile])
                entry = {"implementation": kernel, "chip": kind, **known, "mask": mask}
                table = with_entry(table, {**entry, "length": length, "blocks": list(best), "by": "bundles"})
                told = ", ".join(f"{'x'.join(map(str, tile))} {count}" for tile, count in counts.items())
                report(f"{chip} {width} {mask} {kernel} at {length}, bundles a head: {told}")
    return table


def bundles(step: Step, mask: str, length: int) -> int:
    """Of one head's scores: its tiles of each kind under the mask, each at what a step costs."""
    from ...models.kernels import Causal, Full
    from ...models.kernels.blocks import FULL, PARTIAL, Grid, static_blocks

    rows, columns, _ = step.tile
    rows, columns = min(rows, length), min(columns, length)
    blocks = static_blocks(Full() if mask == "full" else Causal(), Grid(length, length, rows, columns))
    return int((blocks == FULL).sum() * step.full + (blocks == PARTIAL).sum() * step.partial)


def steps_of(chips: Sequence[str], width: int, dtype: str) -> list[Step]:
    """Compile all candidates in a process of their own; those that a chip has no room for are not in it."""
    from ...models.kernels.tpu.block_sizes import CANDIDATES as candidates

    given = [",".join(map(str, tile)) for tile in candidates]
    found = apart("attention_tiles", [",".join(chips), str(width), dtype, *given])
    steps = [Step(**dict(zip(Step._fields, each)))._replace(tile=tuple(each[3])) for each in found]
    if not steps:
        raise InputError(f"no tile of {len(candidates)} compiles for {', '.join(chips)} at width {width}")
    return steps


def _compiled(folder: Path, chips: list[str], width: int, dtype: str, tiles: list[Tile]) -> Iterator[Step]:
    """In the process that dumps: the bundles of each kernel of each tile that a chip has room for."""
    from ...models.kernels import Causal, Full
    from .attention_tpu import mesh_of

    for chip in chips:
        kind = mesh_of(chip, 1).devices.flat[0].device_kind
        for tile in tiles:
            # one row of tiles: the first query sees no whole tile, the last one some of each
            masks = Full(), Causal(tile[1] - 2)
            full, partial = (_counts(folder, chip, width, dtype, tile, mask) for mask in masks)
            for kernel in KERNELS:
                if kernel in full and kernel in partial:
                    yield Step(chip, kind, kernel, tile, full[kernel], partial[kernel])


def _counts(folder: Path, chip: str, width: int, dtype: str, tile: Tile, mask: Mask) -> dict[str, int]:
    """By kernel, two tiles beside each other; without those that do not fit into the chip's memory."""
    from ...models.kernels import Terms
    from ...models.kernels.tpu import Blocks, Tpu
    from .attention_tpu import CompiledCase

    rows, columns, _ = tile
    case = CompiledCase(
        lambda _: Terms(mask, scale=1.0), rows, 2 * columns, width, heads=2, kv_heads=2, batch=1, dtype=dtype
    )
    found: dict[str, int] = {}
    for fused in (True, False):
        blocks = Blocks(*tile)
        try:
            found |= bundles_of_case(folder, case, chip, Tpu(forward=blocks, backward=blocks, fused=fused))
        except jax.errors.JaxRuntimeError as error:
            if "vmem" not in str(error).lower():
                raise
    counts = {kernel: named(found, name) for kernel, name in KERNELS.items()}
    return {kernel: count for kernel, count in counts.items() if count}


if __name__ == "__main__":
    where, of_chips, of_width, of_dtype, *of_tiles = sys.argv[1:]
    asked = [tuple(map(int, tile.split(","))) for tile in of_tiles]
    for each in _compiled(Path(where), of_chips.split(","), int(of_width), of_dtype, cast(list[Tile], asked)):
        print(json.dumps(each), flush=True)
