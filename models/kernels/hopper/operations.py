"""The few operations of a Hopper kernel that Pallas's GPU interpreter does not have, in two forms.

`Warpgroup` is the real form: products run on the tensor cores (wgmma) and values lie in registers in its
layouts. `Interpreted` says the same in plain arrays, so that the rest of a kernel, its indices, masks,
barriers, rings of buffers and copies, runs on a CPU under `InterpretGPUParams`, which also detects races.
What that does not show is whether the layouts and the operands of wgmma are right: compiling to sm_90a shows
that they are accepted, and only a GPU shows that they compute the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .compat import load

Ref = Any  # references into GPU memory have no public type
TENSOR_CORES = "tensor_cores"  # what reads that wgmma does are called where they are interpreted


def nothing() -> None:
    """What is done meanwhile where nothing is."""


@dataclasses.dataclass(frozen=True)
class Warpgroup:
    """The operations of one warpgroup of a Hopper GPU; `interpret` is None but for `Interpreted`."""

    interpret: Any = None

    def row_values(self, ref: Ref) -> Array:
        """A vector with a value for each row of a tile, `[rows]`."""
        return load(ref, plgpu.Layout.WGMMA.reduce(1), optimized=False)  # may lie in device memory

    def column_values(self, ref: Ref) -> Array:
        """A vector with a value for each column of a tile, `[columns]`."""
        return load(ref, plgpu.Layout.WGMMA.reduce(0), optimized=False)

    def tile(self, ref: Ref, in_shared_memory: bool = True) -> Array:
        """A tile `[rows, columns]`; in shared memory it has to lie where no two threads meet in a bank."""
        return load(ref, plgpu.Layout.WGMMA, optimized=in_shared_memory)

    def filled_rows(self, size: int, value: float) -> Array:
        """A float32 vector of the kind of `row_values`."""
        return plgpu.layout_cast(jnp.full((size,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))

    def filled_tile(self, shape: tuple[int, int], value: float) -> Array:
        """A float32 tile."""
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), plgpu.Layout.WGMMA)

    def indices(self, shape: tuple[int, ...], axis: int) -> Array:
        """Each element's own index along `axis`, an int32 tile."""
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)

    def positions(self, size: int, axis: int) -> Array:
        """0, 1, ... along an axis of a tile: int32, of the kind of `row_values` or `column_values`."""
        layout = plgpu.Layout.WGMMA.reduce(1 - axis)
        return plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)

    def product(self, a: Ref, b: Ref, meanwhile: Callable[[], None] = nothing) -> Array:
        """`a [m, k]` times the transpose of `b [n, k]`, both in shared memory: float32 `[m, n]`."""

        def compute(total: Ref) -> Array:
            plgpu.wgmma(total, a, plgpu.transpose_ref(b, (1, 0)))
            meanwhile()
            return total[...]

        return pl.run_scoped(compute, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))

    def product_of_transposed(self, a: Ref, b: Ref) -> Array:
        """The transpose of `a [k, m]` times `b [k, n]`, both in shared memory: float32 `[m, n]`."""

        def compute(total: Ref) -> Array:
            plgpu.wgmma(total, plgpu.transpose_ref(a, (1, 0)), b)
            return total[...]

        return pl.run_scoped(compute, plgpu.ACC((a.shape[1], b.shape[1]), jnp.float32))

    def add_product(self, total: Array, a: Array, b: Ref, meanwhile: Callable[[], None] = nothing) -> Array:
        """`total [m, n]` plus `a [m, k]`, in registers, times `b [k, n]`, in shared memory."""

        def compute(accumulator: Ref) -> None:
            plgpu.wgmma(accumulator, a, b)
            meanwhile()

        return pl.run_state(compute)(plgpu.ACC.init(total))

    def product_from(self, start: Array, a: Ref, b: Ref) -> Array:
        """`start [m, n]` plus `product(a, b)`."""

        def compute(accumulator: Ref) -> None:
            plgpu.wgmma(accumulator, a, plgpu.transpose_ref(b, (1, 0)))

        return pl.run_state(compute)(plgpu.ACC.init(start))

    def two_products(
        self, first: tuple[Ref, Ref], second: tuple[Ref, Ref], between: Callable[[Array], Any]
    ) -> tuple[Any, Array]:
        """`between(product(*first))`, computed while `product(*second)` is, and that product."""

        def compute(one: Ref, two: Ref) -> tuple[Any, Array]:
            plgpu.wgmma(one, first[0], plgpu.transpose_ref(first[1], (1, 0)))
            plgpu.wgmma(two, second[0], plgpu.transpose_ref(second[1], (1, 0)))
            result = between(plgpu.wgmma_accumulator_load(one, wait_n=1))
            return result, plgpu.wgmma_accumulator_load(two, wait_n=0)

        shapes = [(a.shape[0], b.shape[0]) for a, b in (first, second)]
        return pl.run_scoped(compute, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))

    def add_two_products(
        self, totals: tuple[Array, Array], factors: tuple[tuple[Array, Ref], tuple[Array, Ref]]
    ) -> tuple[Array, Array]:
        """`add_product` of each total and its factors, both in flight together."""

        def compute(accumulators: tuple[Ref, Ref]) -> None:
            for accumulator, (a, b) in zip(accumulators, factors):
                plgpu.wgmma(accumulator, a, b)

        return pl.run_state(compute)((plgpu.ACC.init(totals[0]), plgpu.ACC.init(totals[1])))


@dataclasses.dataclass(frozen=True)
class Interpreted(Warpgroup):
    """The same on plain arrays; `interpret` is an `InterpretGPUParams`."""

    def row_values(self, ref: Ref) -> Array:
        """A plain read."""
        return ref[...]

    column_values = row_values

    def tile(self, ref: Ref, in_shared_memory: bool = True) -> Array:
        """A plain read."""
        return ref[...]

    def filled_rows(self, size: int, value: float) -> Array:
        """A plain vector."""
        return jnp.full((size,), value, jnp.float32)

    def filled_tile(self, shape: tuple[int, int], value: float) -> Array:
        """A plain tile."""
        return jnp.full(shape, value, jnp.float32)

    def indices(self, shape: tuple[int, ...], axis: int) -> Array:
        """A plain iota."""
        return lax.broadcasted_iota(jnp.int32, shape, axis)

    def positions(self, size: int, axis: int) -> Array:
        """A plain iota."""
        return lax.iota(jnp.int32, size)

    def product(self, a: Ref, b: Ref, meanwhile: Callable[[], None] = nothing) -> Array:
        """In plain arithmetic, then what is done meanwhile."""
        value = _dot(_read(a), _read(b).T)
        meanwhile()
        return value

    def product_of_transposed(self, a: Ref, b: Ref) -> Array:
        """In plain arithmetic."""
        return _dot(_read(a).T, _read(b))

    def add_product(self, total: Array, a: Array, b: Ref, meanwhile: Callable[[], None] = nothing) -> Array:
        """In plain arithmetic, then what is done meanwhile."""
        value = total + _dot(a, _read(b))
        meanwhile()
        return value

    def product_from(self, start: Array, a: Ref, b: Ref) -> Array:
        """In plain arithmetic."""
        return start + self.product(a, b)

    def two_products(
        self, first: tuple[Ref, Ref], second: tuple[Ref, Ref], between: Callable[[Array], Any]
    ) -> tuple[Any, Array]:
        """One after the other."""
        return between(self.product(*first)), self.product(*second)

    def add_two_products(
        self, totals: tuple[Array, Array], factors: tuple[tuple[Array, Ref], tuple[Array, Ref]]
    ) -> tuple[Array, Array]:
        """One after the other."""
        one, two = (self.add_product(total, *pair) for total, pair in zip(totals, factors))
        return one, two


def _read(ref: Ref) -> Array:
    """An operand in shared memory, by a name that tells its read from that of a thread (`TENSOR_CORES`)."""
    with jax.named_scope(TENSOR_CORES):
        return ref[...]


def _dot(a: Array, b: Array) -> Array:
    return jax.lax.dot(a, b, preferred_element_type=jnp.float32)
