"""CPU seconds of products grouped by expert: tiles, `lax.ragged_dot`, every expert on every row, and dense.

    python -m modicum.experiments.bench.grouped

Prints the table of docs/experts.md: process time, the least of several runs, on this machine. Half a minute.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ...models.grouped import grouped_product

ROWS, WIDTH, HIDDEN, EXPERTS, RUNS = 4096, 256, 512, 8, 5


def every_expert(rows: Array, kernels: Array, sizes: Array) -> Array:
    """All products of all rows, of which each row's own is kept."""
    group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(rows)), side="right")

    def add(total: Array, expert: tuple[Array, Array]) -> tuple[Array, None]:
        number, kernel = expert
        return total + jnp.where((group == number)[:, None], rows @ kernel, 0), None

    start = jnp.zeros((len(rows), kernels.shape[2]), rows.dtype)
    return lax.scan(add, start, (jnp.arange(len(kernels)), kernels))[0]


WAYS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "one dense product": lambda rows, kernels, sizes: rows @ kernels[0],
    "grouped_product": grouped_product,
    "every expert, masked": every_expert,
    "lax.ragged_dot": lax.ragged_dot,
}


def seconds(function: Callable[..., Array], *given: Array) -> float:
    """The least process time of a call."""
    compiled = jax.jit(function).lower(*given).compile()
    times = []
    for _ in range(RUNS + 1):
        start = time.process_time()
        jax.block_until_ready(compiled(*given))
        times.append(time.process_time() - start)
    return min(times[1:])


def main() -> None:
    """Print the table."""
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.float32)
    kernels = jnp.asarray(rng.normal(size=(EXPERTS, WIDTH, HIDDEN)), jnp.float32)
    sizes = jnp.asarray(np.bincount(rng.integers(0, EXPERTS, ROWS), minlength=EXPERTS), jnp.int32)
    work = 2e-9 * ROWS * WIDTH * HIDDEN
    print("| way | forward ms | useful GFLOP/s | with gradients ms | useful GFLOP/s |")
    print("|---|---|---|---|---|")
    for name, way in WAYS.items():

        def total(rows: Array, kernels: Array, way: Callable[..., Array] = way) -> Array:
            return jnp.square(way(rows, kernels, sizes)).sum()

        forward = seconds(way, rows, kernels, sizes)
        both = seconds(jax.grad(total, argnums=(0, 1)), rows, kernels)
        speeds = [f"{1e3 * t:.1f} | {n * work / t:.0f}" for t, n in ((forward, 1), (both, 3))]
        print(f"| {name} | {' | '.join(speeds)} |", flush=True)


if __name__ == "__main__":
    main()
