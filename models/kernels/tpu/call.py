"""`pallas_call` with names for what a kernel gets, and a place in the score matrix for each step."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..block_lists import Entry, unpack

# Of 64 MiB on v5p and 128 on v5e and v6e; the default of 16 to 32 MiB is made for smaller kernels.
VMEM_LIMIT = 56 << 20


class At(NamedTuple):
    """Where a step of the grid is: batch row, block of heads, key head, block of queries and of keys."""

    batch: Any
    heads: Any
    group: Any
    row: Any
    column: Any


class Refs(NamedTuple):
    """What a kernel sees: scalars, inputs, outputs and scratch memory, by name."""

    scalars: dict[str, Any]
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    scratch: dict[str, Any]


class Block(NamedTuple):
    """A block of an array and, from the place of a step, its index; None in the shape drops the axis."""

    shape: tuple[int | None, ...]
    place: Callable[[At], tuple[Any, ...]]


class Walk(NamedTuple):
    """A grid whose steps follow a list of tiles; `locate` says from ids and entry where a step is.

    `lists [b, g, N]` are packed entries; `which` tells from the ids which list and which entry of it.
    """

    grid: tuple[int, ...]
    lists: Any
    which: Callable[..., tuple[Any, Any, Any]]
    locate: Callable[..., At]
    parallel: int

    def entry(self, ids: Sequence[Any], ref: Any) -> Entry:
        """The entry of a step."""
        batches, groups, length = self.lists.shape
        batch, group, number = self.which(*ids)
        at = (batch if batches > 1 else 0) * groups + (group if groups > 1 else 0)
        return unpack(ref[at * length + number])

    def at(self, ids: Sequence[Any], ref: Any) -> At:
        """Its place."""
        return self.locate(*ids, self.entry(ids, ref))


def call(
    kernel: Callable[[Walk, Refs], None],
    name: str,
    walk: Walk,
    scalars: Mapping[str, Array],
    inputs: Mapping[str, tuple[Array, Block]],
    outputs: Mapping[str, tuple[tuple[int, ...], Any, Block]],
    scratch: Mapping[str, tuple[int, ...]],
    cost: pl.CostEstimate,
    interpret: Any,
) -> dict[str, Array]:
    """Run a kernel along `walk`; outputs by name, scratch memory is float32."""
    prefetched = {"tiles": jnp.asarray(walk.lists).reshape(-1), **scalars}
    ids = len(walk.grid)
    semantics: Any = ("parallel",) * walk.parallel + ("arbitrary",) * (ids - walk.parallel)

    def spec(block: Block) -> pl.BlockSpec:
        return pl.BlockSpec(block.shape, lambda *given: block.place(walk.at(given[:ids], given[ids])))

    def body(*refs: Any) -> None:
        left, sizes = list(refs), (len(prefetched), len(inputs), len(outputs))
        parts = [[left.pop(0) for _ in range(size)] for size in sizes]
        named = [dict(zip(names, part)) for names, part in zip((prefetched, inputs, outputs), parts)]
        kernel(walk, Refs(named[0], named[1], named[2], dict(zip(scratch, left))))

    arrays = [*prefetched.values(), *(array for array, _ in inputs.values())]
    results = pl.pallas_call(
        body,
        name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=walk.grid,
            in_specs=[spec(block) for _, block in inputs.values()],
            out_specs=[spec(block) for *_, block in outputs.values()],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
        ),
        out_shape=[_result(shape, dtype, arrays) for shape, dtype, _ in outputs.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics,
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        cost_estimate=cost,
        interpret=interpret,
    )(*arrays)
    return dict(zip(outputs, results))


def ids_and_entry(walk: Walk, refs: Refs) -> tuple[tuple[Any, ...], Entry, At]:
    """Of the step that a kernel is in; to be asked for outside of conditions, where there are no ids."""
    ids = tuple(pl.program_id(i) for i in range(len(walk.grid)))
    return ids, walk.entry(ids, refs.scalars["tiles"]), walk.at(ids, refs.scalars["tiles"])


def cost(tiles: int, area: int, widths: int, arrays: Sequence[Array]) -> pl.CostEstimate:
    """Of products of widths `widths` together over `tiles` of `area` pairs, reading the arrays once."""
    read = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
    return pl.CostEstimate(
        flops=2 * tiles * area * widths, transcendentals=tiles * area, bytes_accessed=int(read)
    )


def _result(shape: tuple[int, ...], dtype: Any, arrays: Sequence[Array]) -> jax.ShapeDtypeStruct:
    """Inside `shard_map` a result varies over the mesh axes that the operands vary over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(arrays[-1]).manual_axis_type)
