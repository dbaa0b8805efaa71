"""Why nothing fits or divides, in one line: which memory is too small, and what each mesh axis could be."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from ..mesh import MeshShape
from .costs import Assumptions, Job
from .layers import LayerTable
from .topology import Topology


class Need(NamedTuple):
    """The least bytes that a split takes: of the device, and with that of its host."""

    device: float
    host: float = 0.0


def lacking(topology: Topology, needs: Sequence[Need], assume: Assumptions) -> str:
    """Which memory is too small, and by how much: the device's, or offloaded its host's.

    Some of the splits must be without offloading.
    """
    budget, host = topology.chip.memory * (1 - assume.reserve), assume.host
    there = f"{budget / 2**30:.1f} GiB are there"
    alone = min(need.device for need in needs if need.host <= host)
    text = f"the smallest plan needs {alone / 2**30:.1f} GiB a device, {there}"
    helped = [need.host for need in needs if need.device <= budget and need.host > host]
    if not helped:
        return text
    wanted = f"{min(helped) / 2**30:.1f} GiB of its host's, {host / 2**30:.1f} GiB are taken to be there"
    return f"{text}; offloaded, a device would do, but needs {wanted}"


def uncut(job: Job, mesh: MeshShape, accumulate: int | None) -> str:
    """Why no number of micro-batches will do."""
    rows = job.batch // (mesh.data * mesh.fsdp)
    text = f"batch {job.batch} cannot be cut into micro-batches: mesh {mesh} has {rows} rows a replica"
    if accumulate is not None and rows % accumulate:
        return f"{text}, which {accumulate} does not divide"
    count = rows if accumulate is None else accumulate
    return f"{text}; pipe={mesh.pipe} needs at least {mesh.pipe} micro-batches, there can be {count}"


def refuse(job: Job, mesh: MeshShape) -> str:
    """Why the mesh does not divide the job; empty where it does."""
    copies = mesh.data * mesh.fsdp
    if job.batch % copies:
        return f"data x fsdp = {copies} does not divide batch={job.batch}"
    if job.length % mesh.context:
        return f"context={mesh.context} does not divide length={job.length}"
    if len(job.table.layers) < mesh.pipe:
        return f"pipe={mesh.pipe} is more than layers={len(job.table.layers)}"
    return job.table.refuse("tensor", mesh.tensor)


def allowed(job: Job, axes: Sequence[str], size: int) -> str:
    """Which ways of so many devices each axis could have."""
    parts = divisors(size)
    ways = {
        "data x fsdp": ([n for n in parts if job.batch % n == 0], f"batch={job.batch}"),
        "tensor": ([n for n in parts if not job.table.refuse("tensor", n)], _named(job.table, size)),
        "context": ([n for n in parts if job.length % n == 0], f"length={job.length}"),
        "pipe": ([n for n in parts if n <= len(job.table.layers)], f"layers={len(job.table.layers)}"),
    }
    there = [name for name in ways if set(name.split(" x ")) & set(axes)]
    texts = [f"{name} can be {', '.join(map(str, ways[name][0]))} ({ways[name][1]})" for name in there]
    return "; ".join(texts)


def _named(table: LayerTable, size: int) -> str:
    """The size that keeps tensor from having all devices, or that it is free."""
    refusal = table.refuse("tensor", size)
    return refusal.partition(" divide ")[2] or "any"


@lru_cache
def divisors(number: int) -> tuple[int, ...]:
    """All divisors, rising."""
    small = [part for part in range(1, int(number**0.5) + 1) if number % part == 0]
    return tuple(sorted({*small, *(number // part for part in small)}))
