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
from ...models.kernels.request import Implementation, Request, request_of
from .attention_jax import JaxAttention
from .attention_job import AttentionJob

Blocks = tuple[int, ...]


@runtime_checkable
class Tunable(Protocol):
    """An implementation that takes block sizes and says which are worth a try."""

    def candidates(self, request: Request) -> Mapping[str, Sequence[Blocks]]:
        """By the name of its entries in the table the block sizes that are worth a try for a request."""

    def with_blocks(self, name: str, blocks: Blocks) -> Implementation:
        """Itself with these for what has that name, whatever the table says."""


def tune(
    job: AttentionJob,
    table: list[Mapping[str, Any]],
    *,
    lengths: Sequence[int],
    rounds: int,
    without: Sequence[str] = (),
    report: Callable[[str], None] = print,
) -> list[Mapping[str, Any]]:
    """The table with an entry for each length and kernel of the implementations that can do the job here.

    Timed are forward and backward pass together, candidates in turns, medians over the rounds; in this
    process, which should have the machine to itself. An implementation that cannot do the job here is told
    with its reason. Raises InputError for a bias, which entries know nothing of, and where nothing here has
    blocks, before anything is timed.
    """
    if job.bias != "none":
        raise InputError(f"bias={job.bias}: entries would be taken without a bias too; tune without one")
    attention = JaxAttention(job)
    todo = list(_todo(attention, lengths, without, report))
    if not todo:
        raise InputError("nothing on this platform takes block sizes for this job; the table stays as it is")
    for implementation, name, length, candidates in todo:
        seconds = dict(_timed(attention, implementation, name, candidates, length, rounds, report))
        best = min(seconds, key=lambda blocks: seconds[blocks])
        fields = found_fields(job.dtype, job.width, attention.mask(length))
        entry = {"implementation": name, **fields, "length": length, "blocks": list(best), "by": "time"}
        table = with_entry(table, entry)
        times = ", ".join(f"{'x'.join(map(str, b))} {1e3 * s:.1f}" for b, s in seconds.items())
        report(f"{name} at {length}, ms: {times}")
    return table


def _todo(
    attention: JaxAttention, lengths: Sequence[int], without: Sequence[str], report: Callable[[str], None]
) -> Iterator[tuple[Tunable, str, int, Sequence[Blocks]]]:
    """What is to be timed: who, under which name, at which length and with which blocks."""
    for implementation in implementations():
        if implementation.name in without or not isinstance(implementation, Tunable):
            continue
        for length in lengths:
            q, k, _, _, bias = attention.given(length)
            terms = terms_of(q, k, k, attention.mask(length), bias, None, None, None, None)
            request = request_of(q, k, k, terms, False)
            if reason := implementation.supports(request):
                report(f"{implementation.name}: {reason}; its blocks stay as they are")
                break
            for name, candidates in implementation.candidates(request).items():
                if len(candidates) > 1:
                    yield implementation, name, length, candidates


def _timed(
    attention: JaxAttention,
    implementation: Tunable,
    name: str,
    candidates: Sequence[Blocks],
    length: int,
    rounds: int,
    report: Callable[[str], None],
) -> Iterator[tuple[Blocks, float]]:
    """Medians of those that compile; what the compiler says of the others is told."""
    q, k, v, d_out, bias = attention.given(length)
    terms = terms_of(q, k, v, attention.mask(length), bias, None, None, None, None)

    def compiled(blocks: Blocks) -> Callable[[], Any]:
        attend = implementation.with_blocks(name, blocks)

        def both(q: Any, k: Any, v: Any, bias: Any) -> Any:
            call = lambda q, k, v, bias: attend(q, k, v, replace(terms, bias=bias))  # noqa: E731
            outputs, pull = jax.vjp(call, q, k, v, bias)
            return outputs, pull((d_out, jnp.zeros_like(outputs[1])))

        step = jax.jit(both).lower(q, k, v, bias).compile()
        return lambda: jax.block_until_ready(step(q, k, v, bias))

    steps = {}
    for blocks in candidates:
        try:
            steps[blocks] = compiled(blocks)
        except jax.errors.JaxRuntimeError as error:  # no room for such tiles
            report(f"{name} {'x'.join(map(str, blocks))} does not compile: {str(error).splitlines()[0]}")
    if not steps:
        raise InputError(f"none of the {len(candidates)} block sizes of {name} compiles at {length}")
    times: dict[Blocks, list[float]] = {blocks: [] for blocks in steps}
    for index in range(rounds + 1):
        for blocks, step in steps.items():
            start = time.perf_counter()
            step()
            if index:  # the first allocates
                times[blocks].append(time.perf_counter() - start)
    yield from ((blocks, median(each)) for blocks, each in times.items())
