"""A step of decoding on a cache in pages, on the GPU at hand: time, and bytes of keys and values a second.

    python -m modicum.experiments.bench.decode_gpu --out FOLDER

Our kernel beside XLA's gather, which copies the pages first. What bounds a step is reading keys and values
once, so the rate is to be held against the memory's own.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

from ...research.study.tables import Table


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Sizes: B rows of `length` keys each, of `heads` query heads and `kv_heads` key heads."""

    batch: int
    length: int
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    page: int = 16

    @property
    def size(self) -> int:
        """Bytes of keys and values."""
        return 2 * 2 * self.batch * self.length * self.kv_heads * self.width


CASES = (
    *(Decoding(1, 32768, width=width) for width in (64, 128)),
    *(Decoding(8, 8192, width=width) for width in (64, 128)),
    *(Decoding(64, 2048, width=width) for width in (64, 128)),
    Decoding(8, 8192, page=64),
    Decoding(8, 8192, kv_heads=1),
    Decoding(8, 8192, kv_heads=32),
)


def arrays(case: Decoding) -> tuple[Any, ...]:
    """Queries, and keys and values on pages in random order, bfloat16; all rows full."""
    import jax
    import jax.numpy as jnp

    from ...models.kernels import Paged

    keys = jax.random.split(jax.random.key(0), 4)
    room = case.length // case.page
    table = jax.random.permutation(keys[3], case.batch * room).reshape(case.batch, room).astype(jnp.int32)
    pool = (case.batch * room, case.page, case.kv_heads, case.width)
    k, v = (Paged(jax.random.normal(key, pool, jnp.bfloat16), table) for key in keys[:2])
    q = jax.random.normal(keys[2], (case.batch, 1, case.heads, case.width), jnp.bfloat16)
    return q, k, v, jnp.full((case.batch,), case.length, jnp.int32)


def measure(case: Decoding, impl: str, rounds: int, calls: int) -> float:
    """Seconds of a step, the median of `rounds` means over `calls`; raises InputError where it cannot be."""
    import jax

    from ...models.kernels import decode_attention

    step = jax.jit(functools.partial(decode_attention, impl=impl))
    q, k, v, lengths = arrays(case)
    jax.block_until_ready(step(q, k, v, lengths=lengths))
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        out = [step(q, k, v, lengths=lengths) for _ in range(calls)]
        jax.block_until_ready(out)
        found.append((time.perf_counter() - start) / calls)
    return statistics.median(found)


def table_of(
    cases: tuple[Decoding, ...] = CASES,
    impls: tuple[str, ...] = ("hopper", "gathered"),
    rounds: int = 7,
    calls: int = 20,
) -> Table:
    """A row for each case, with a time and a rate for each implementation."""
    columns = ["batch", "length", "heads", "key heads", "width", "page"]
    columns += [f"{impl} {unit}" for impl in impls for unit in ("µs", "GB/s")]
    rows = []
    for case in cases:
        times = [measure(case, impl, rounds, calls) for impl in impls]
        found = [round(x, 1) for t in times for x in (t * 1e6, case.size / t / 1e9)]
        rows.append((case.batch, case.length, case.heads, case.kv_heads, case.width, case.page, *found))
    return Table(tuple(columns), tuple(rows))


def main(out: Path, rounds: int = 7) -> None:
    """Measure all cases and write `decode.md` and `decode.json` into a folder."""
    found = table_of(rounds=rounds)
    out.mkdir(parents=True, exist_ok=True)
    (out / "decode.md").write_text(found.markdown())
    rows = [dict(zip(found.columns, row)) for row in found.rows]
    (out / "decode.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(found.markdown())


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    main(**vars(parser.parse_args()))
