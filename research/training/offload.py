"""Optimizer state that lies in the host's memory and is on the device only while it is updated.

Moments take 8 of the 16 bytes a parameter of AdamW in float32, and are used once a step. Placing them is a
sharding's memory kind; inside the step one transfer brings them, and the outputs' shardings take them back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from ... import InputError
from .state import TrainState

Tree = Any
HOST = "pinned_host"


def in_host_memory(shardings: TrainState, shapes: TrainState) -> TrainState:
    """The shardings of a state with the optimizer's arrays in the host's memory; counters stay.

    Raises InputError where the devices know no such memory.
    """
    kinds = _memory_kinds(shardings)
    if HOST not in kinds:
        raise InputError(
            f"offload=True: these devices have no memory {HOST!r}, only {', '.join(sorted(kinds))}"
        )

    def place(sharding: Any, leaf: Any) -> Any:
        return sharding.with_memory_kind(HOST) if leaf.shape else sharding

    return replace(shardings, optimizer=jax.tree.map(place, shardings.optimizer, shapes.optimizer))


def fetching(step: Callable[..., Any], shardings: TrainState) -> Callable[..., Any]:
    """The step of a state that lies as `in_host_memory` says, which has it brought to the device first."""
    here = jax.tree.map(lambda sharding: sharding.with_memory_kind("device"), shardings.optimizer)

    def fetched(state: TrainState, *given: Any) -> Any:
        return step(replace(state, optimizer=jax.device_put(state.optimizer, here)), *given)

    return fetched


def _memory_kinds(shardings: TrainState) -> set[str]:
    sharding = jax.tree.leaves(shardings)[0]
    device = next(iter(sharding.device_set))
    try:
        return {memory.kind for memory in device.addressable_memories()}
    except jax.errors.JaxRuntimeError:  # a device to compile for only: those are TPUs and GPUs
        return {HOST, "device"}
