"""A ring of buffers in shared memory that one warpgroup fills and the others empty."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .operations import Ref
from .problem import CONSUMERS

Index = int | Array


class Ring(NamedTuple):
    """`buffers`, each `[stages, ...]`, filled together; a barrier a stage for each direction."""

    buffers: tuple[Any, ...]
    ready: Any
    consumed: Any

    @classmethod
    def scratch(cls, stages: int, buffers: Sequence[Any], in_parts: Sequence[Any] = ()) -> Ring:
        """What a kernel asks for; ended copies arrive at `ready`, warpgroups that have read at `consumed`.

        Buffers `in_parts`, `[stages, CONSUMERS, ...]`, are filled by a copy for each computing warpgroup.
        """
        copies = len(buffers) + CONSUMERS * len(in_parts)
        return cls(
            (*buffers, *in_parts),
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        )

    @property
    def stages(self) -> int:
        """How many buffers there are of each kind."""
        return self.buffers[0].shape[0]

    def fill(self, slot: Index, sources: Sequence[Ref | list[Ref]]) -> None:
        """Start the copies from device memory into one stage; a list fills the parts of a buffer."""
        for source, buffer in zip(sources, self.buffers, strict=True):
            if isinstance(source, list):
                for number, part in enumerate(source):
                    plgpu.copy_gmem_to_smem(part, buffer.at[slot, number], self.ready.at[slot])
            else:
                plgpu.copy_gmem_to_smem(source, buffer.at[slot], self.ready.at[slot])

    def wait(self, slot: Index) -> None:
        """Until the copies into this stage have ended."""
        plgpu.barrier_wait(self.ready.at[slot])

    def release(self, slot: Index, read: bool = False) -> None:
        """This warpgroup needs the stage no more; `read` says that threads read of it themselves.

        To the GPU the copy engine and the tensor cores are another party than threads ("async proxy", PTX
        ISA, memory consistency model): that threads have arrived orders what wgmma has read before the next
        copy, and what they have read themselves only behind a fence. Without it a copy may overtake a read.
        """
        if read:
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.consumed.at[slot])

    def slot(self, step: Index) -> Array:
        """The stage of the step-th tile."""
        return lax.rem(step, jnp.asarray(self.stages, jnp.int32))


def copy_all(
    rings: Sequence[Ring], steps: Index, sources: Callable[[Index], Sequence[Sequence[Ref | list[Ref]]]]
) -> None:
    """The work of the copying warpgroup: `sources(step)` are the references that fill each ring."""
    stages = rings[0].stages

    def fill(step: Index, slot: Index) -> None:
        for ring, references in zip(rings, sources(step), strict=True):
            ring.fill(slot, references)

    for first in range(stages):
        pl.when(first < steps)(functools.partial(fill, first, first))

    def refill(step: Array, _: None) -> None:
        slot = rings[0].slot(step)
        for ring, references in zip(rings, sources(step + stages), strict=True):
            plgpu.barrier_wait(ring.consumed.at[slot])
            ring.fill(slot, references)

    jax.lax.fori_loop(0, jnp.maximum(steps - stages, 0), refill, None)
    for slot in range(stages):  # what was read last: whoever frees a barrier has to have seen all of it
        for ring in rings:
            pl.when(slot < steps)(functools.partial(plgpu.barrier_wait, ring.consumed.at[slot]))
