"""Find the block sizes with which an implementation takes least time, for the table it reads them from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from ... import InputError
from ...models.kernels import implementations
from ...models.kernels.block_sizes import found_fields, with_entry
from ...models.kernels.front import terms_of
from ...models.kernels.request import Implementation, request_of
from .attention_jax import JaxAttention
from .attention_job import AttentionJob

Blocks = tuple[int, ...]


@runtime_checkable
class Tunable(Protocol):
    """An implementation that takes block sizes and says which are worth a try."""

    def candidates(self, length: int) -> Sequence[Blocks]:
        """Block sizes for a length."""

    def with_blocks(self, blocks: Blocks) -> Implementation:
        """Itself with these, whatever the table says."""


def tune(
    job: AttentionJob,
    table: list[Mapping[str, Any]],
    *,
    lengths: Sequence[int],
    rounds: int,
    report: Callable[[str], None] = print,
) -> list[Mapping[str, Any]]:
    """The table with an entry for each length and implementation that can do the job here.

    Timed are forward and backward pass together, candidates in turns, medians over the rounds; in this
    process, which should have the machine to itself. Raises InputError where nothing here has blocks.
    """
    attention, found = JaxAttention(job), 0
    for length in lengths:
        q, k, _, _, bias = attention.given(length)
        terms = terms_of(q, k, k, attention.mask(length), bias, None, None, None, None)
        for implementation in implementations():
            if isinstance(implementation, Tunable) and not implementation.supports(
                request_of(q, k, k, terms, False)
            ):
                seconds = dict(_timed(attention, implementation, length, rounds))
                best = min(seconds, key=lambda blocks: seconds[blocks])
                fields = found_fields(job.dtype, job.width, attention.mask(length))
                entry = {
                    "implementation": implementation.name,
                    **fields,
                    "length": length,
                    "blocks": list(best),
                }
                table, found = with_entry(table, entry), found + 1
                times = ", ".join(f"{'x'.join(map(str, b))} {1e3 * s:.1f}" for b, s in seconds.items())
                report(f"{implementation.name} at {length}, ms: {times}")
    if not found:
        raise InputError("no implementation on this platform takes block sizes")
    return table


def _timed(
    attention: JaxAttention, implementation: Tunable, length: int, rounds: int
) -> Iterator[tuple[Blocks, float]]:
    q, k, v, d_out, bias = attention.given(length)
    terms = terms_of(q, k, v, attention.mask(length), bias, None, None, None, None)

    def compiled(blocks: Blocks) -> Callable[[], Any]:
        def both(q: Any, k: Any, v: Any, bias: Any) -> Any:
            call = lambda q, k, v, bias: implementation.with_blocks(blocks)(  # noqa: E731
                q, k, v, replace(terms, bias=bias)
            )
            outputs, pull = jax.vjp(call, q, k, v, bias)
            return outputs, pull((d_out, jnp.zeros_like(outputs[1])))

        step = jax.jit(both).lower(q, k, v, bias).compile()
        return lambda: jax.block_until_ready(step(q, k, v, bias))

    steps = {blocks: compiled(blocks) for blocks in implementation.candidates(length)}
    times: dict[Blocks, list[float]] = {blocks: [] for blocks in steps}
    for index in range(rounds + 1):
        for blocks, step in steps.items():
            start = time.perf_counter()
            step()
            if index:  # the first allocates
                times[blocks].append(time.perf_counter() - start)
    yield from ((blocks, median(each)) for blocks, each in times.items())
