"""The kernels of `hopper`: the chosen neurons of all tokens, then their sums; blocks of one warpgroup.

Tokens are the rows of products, padded to the 64 of the tensor cores: what bounds the time is memory.
An expert's tiles are copied (TMA) some steps ahead. What a token did not choose is zero between the kernels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..hopper.operations import Interpreted, Ref, Warpgroup
from ..hopper.problem import tiled
from ..hopper.scores import along
from .experts import Experts
from .hopper import ROWS, Chosen

COLUMNS = 64  # of x, or of the output, in a tile
NEURONS = 64  # in a step of the sums, the least that a swizzled tile of 128 bytes allows
BLOCKS = 264  # two for each of the 132 multiprocessors of an H100 or H200
STAGES = 4  # tiles on their way

# As in `models.mlp`, without the rules of differentiation that Mosaic does not lower.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda z: jnp.maximum(z, 0.0),
    "relu2": lambda z: jnp.square(jnp.maximum(z, 0.0)),
    "gelu_tanh": lambda z: 0.5 * z * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (z + 0.044715 * z * z * z))),
    "silu": lambda z: z / (1 + jnp.exp(-z)),
    "sigmoid": lambda z: 1 / (1 + jnp.exp(-z)),
    "tanh": jnp.tanh,
}


class _Weights(NamedTuple):
    """Of `Experts`, what comes before the activation."""

    up: Any
    gate: Any
    up_bias: Any
    gate_bias: Any


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What is known when compiling: `used` experts of `size` neurons, in pieces of `piece`."""

    used: int
    size: int
    piece: int
    width: int
    dtype: Any
    activation: str
    operations: Warpgroup

    @property
    def steps(self) -> int:
        """Of the sums: 64 neurons each, those of the last perhaps of no expert that counts."""
        return -(-self.used * self.size // NEURONS)

    @property
    def splits(self) -> int:
        """Blocks that share the neurons of one tile of the output."""
        return max(1, min(BLOCKS // (self.width // COLUMNS), self.steps))

    def place(self, piece: Any) -> tuple[Array, Any]:
        """A piece's place in the list of experts, at most the last, and its rows there."""
        pieces = jnp.int32(self.size // self.piece)
        index = jnp.minimum(lax.div(piece, pieces), self.used - 1)
        return index, pl.ds(lax.rem(piece, pieces) * self.piece, self.piece)


def run(interpret: Any, x: Array, experts: Experts, chosen: Chosen) -> Array:
    """x `[64, D]` to float32 `[64, D]`; sums are in a fixed order."""
    operations = Warpgroup() if interpret is None else Interpreted(interpret)
    piece = next(size for size in (64, 32, 16) if experts.size % size == 0)
    sizes = (chosen.used.shape[0], experts.size, piece, experts.width)
    layer = _Layer(*sizes, x.dtype, experts.activation, operations)
    return _sums(layer, _neurons(layer, x, experts, chosen), experts.down, chosen).sum(0)


class _Buffers(NamedTuple):
    x: Any
    up: Any
    gate: Any
    ready: Any


def _neurons(layer: _Layer, x: Array, experts: Experts, chosen: Chosen) -> Array:
    """`[64, steps * 64]` in the type of x, zero of experts that do not count."""
    tile = tiled((STAGES, layer.piece, COLUMNS), layer.dtype)
    gated = experts.gate is not None
    buffers = _Buffers(
        tiled((STAGES, ROWS, COLUMNS), layer.dtype),
        tile,
        tile if gated else None,
        plgpu.Barrier(num_arrivals=3 if gated else 2, num_barriers=STAGES),
    )
    pieces = layer.steps * NEURONS // layer.piece
    kernel = plgpu.kernel(
        functools.partial(_neurons_body, layer),
        out_type=jax.ShapeDtypeStruct((ROWS, pieces * layer.piece), layer.dtype),
        scratch_types=(buffers,),
        grid=(pieces,),
        grid_names=("piece",),
        kernel_name="sparse_neurons",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=layer.operations.interpret,
    )
    weights = _Weights(experts.up, experts.gate, experts.up_bias, experts.gate_bias)
    return kernel(x, weights, chosen)


def _neurons_body(
    layer: _Layer, x: Ref, experts: _Weights, chosen: Chosen, out: Ref, buffers: _Buffers
) -> None:
    piece = lax.axis_index("piece")
    index, rows = layer.place(piece)
    place = pl.ds(piece * layer.piece, layer.piece)
    counts = piece * layer.piece < chosen.number[0] * layer.size

    @pl.when(counts)
    def _() -> None:
        weights = (chosen.used[index], rows)
        value = _activated(layer, experts, weights, _products(layer, x, experts, weights, buffers))
        member = layer.operations.row_values(chosen.member.at[index])
        out[:, place] = (value * along(member, value.shape, 0)).astype(layer.dtype)

    @pl.when(~counts)
    def _() -> None:
        out[:, place] = layer.operations.filled_tile((ROWS, layer.piece), 0).astype(layer.dtype)


def _products(layer: _Layer, x: Ref, experts: _Weights, rows: tuple, buffers: _Buffers) -> tuple[Array, ...]:
    """x times the rows of `up` and, where there is one, of `gate`: float32 `[64, piece]` each."""
    pairs = [(experts.up, buffers.up), (experts.gate, buffers.gate)]
    weights = [(array, buffer) for array, buffer in pairs if array is not None]

    def copy(step: Any, slot: Any) -> None:
        columns, ready = pl.ds(step * COLUMNS, COLUMNS), buffers.ready.at[slot]
        plgpu.copy_gmem_to_smem(x.at[:, columns], buffers.x.at[slot], ready)
        for array, buffer in weights:
            plgpu.copy_gmem_to_smem(array.at[(*rows, columns)], buffer.at[slot], ready)

    def add(step: Array, slot: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        del step
        factors = zip(totals, weights)
        product = layer.operations.product_from
        return tuple(product(total, buffers.x.at[slot], buffer.at[slot]) for total, (_, buffer) in factors)

    start = tuple(layer.operations.filled_tile((ROWS, layer.piece), 0) for _ in weights)
    return _pipelined(jnp.int32(0), jnp.int32(layer.width // COLUMNS), buffers.ready, copy, add, start)


def _activated(layer: _Layer, experts: _Weights, rows: tuple, products: tuple[Array, ...]) -> Array:
    """The neurons, from the products with `up` and `gate`."""

    def shifted(value: Array, bias: Ref | None) -> Array:
        if bias is None:
            return value
        shift = layer.operations.column_values(bias.at[rows]).astype(jnp.float32)
        return value + along(shift, value.shape, 1)

    act, up = ACTIVATIONS[layer.activation], shifted(products[0], experts.up_bias)
    return act(up) if len(products) == 1 else act(shifted(products[1], experts.gate_bias)) * up


def _sums(layer: _Layer, neurons: Array, down: Array, chosen: Chosen) -> Array:
    """Float32 `[splits, 64, D]`."""
    tile = tiled((STAGES, NEURONS, COLUMNS), layer.dtype)
    copies = NEURONS // layer.piece
    kernel = plgpu.kernel(
        functools.partial(_sums_body, layer),
        out_type=jax.ShapeDtypeStruct((layer.splits, ROWS, layer.width), jnp.float32),
        scratch_types=(tile, plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES)),
        grid=(layer.width // COLUMNS, layer.splits),
        grid_names=("column", "split"),
        kernel_name="sparse_sums",
        interpret=layer.operations.interpret,
    )
    return kernel(neurons, down, chosen)


def _sums_body(
    layer: _Layer, neurons: Ref, down: Ref, chosen: Chosen, out: Ref, buffer: Ref, ready: Ref
) -> None:
    columns, split = pl.ds(lax.axis_index("column") * COLUMNS, COLUMNS), lax.axis_index("split")
    count = lax.div(chosen.number[0] * layer.size + (NEURONS - 1), jnp.int32(NEURONS))
    each = lax.div(count + (layer.splits - 1), jnp.int32(layer.splits))
    first = jnp.minimum(split * each, count)
    end = jnp.minimum(first + each, count)
    copies = NEURONS // layer.piece

    def copy(step: Any, slot: Any) -> None:
        for number in range(copies):
            index, rows = layer.place(step * copies + number)
            part = buffer.at[slot, pl.ds(number * layer.piece, layer.piece)]
            source = down.at[chosen.used[index], rows, columns]
            plgpu.copy_gmem_to_smem(source, part, ready.at[slot])

    def add(step: Array, slot: Array, total: Array) -> Array:
        value = layer.operations.tile(neurons.at[:, pl.ds(step * NEURONS, NEURONS)], in_shared_memory=False)
        return layer.operations.add_product(total, value, buffer.at[slot])

    out[split, :, columns] = _pipelined(
        first, end, ready, copy, add, layer.operations.filled_tile((ROWS, COLUMNS), 0)
    )


def _pipelined(first: Array, end: Array, ready: Ref, copy: Callable, add: Callable, start: Any) -> Any:
    """A sum over steps, each `copy(step, slot)` started `STAGES` before its `add(step, slot, total)`."""
    for ahead in range(STAGES):
        pl.when(first + ahead < end)(functools.partial(copy, first + ahead, jnp.int32(ahead)))

    def body(step: Array, total: Any) -> Any:
        slot = lax.rem(step - first, jnp.int32(STAGES))
        plgpu.barrier_wait(ready.at[slot])
        total = add(step, slot, total)
        following = step + STAGES
        pl.when(following < end)(lambda: copy(following, slot))
        return total

    return lax.fori_loop(first, end, body, start)
