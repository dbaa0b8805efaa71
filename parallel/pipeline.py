"""A pipeline over a mesh axis: each device has some of the layers, and micro-batches go from one to the next.

With P devices and M micro-batches, a pass takes M + P - 1 turns, of which P - 1 are lost to filling and
draining: the bubble is (P - 1) / (M + P - 1) (Huang et al. 2019, "GPipe", arXiv:1811.06965). Interleaved,
the layers lie in R P chunks, dealt out in turn, and each micro-batch goes round R times; turns are R times as
short, R M + P - 1 of them, and the bubble is (P - 1) / (R M + P - 1) (Narayanan et al. 2021,
arXiv:2104.04473, §2.2; there in 1F1B order, which needs the loss inside the pipeline, where here
differentiation runs the pipeline backwards). Kept for that are the inputs of all turns, R M + P - 1
micro-batches of `x` on every device, and what `stage` itself keeps.

Nothing here knows of a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from .. import InputError
from .manual import mesh_here

Tree = Any
Stage = Callable[[Tree, Array, Tree], tuple[Array, Tree]]


def pipeline(
    stage: Stage,
    weights: Tree,
    x: Array,
    given: Tree = None,
    shared: Tree = None,
    *,
    mesh: Mesh,
    axis: str = "pipe",
    rounds: int = 1,
) -> tuple[Array, Tree]:
    """Every micro-batch of `x [M, b, ...]` through all layers: `[M, b, ...]`, and sums over micro-batches.

    `stage(weights, x, given)` runs some successive layers on one micro-batch `x [b, ...]`: `weights` are
    theirs, `[l, ...]`, of leaves `[L, ...]`; `given` is `(given, shared)`, of each `given [M, ...]` row m.
    It returns x and a tree of leaves `[l, ...]` to be summed over micro-batches, given back as `[L, ...]`.

    The micro-batches lie over `axis`, M / P on each device, before and after; the layers too, in order, and
    for `rounds` > 1 are dealt anew at every call (all-to-all of the weights, and back of their gradients).
    Other mesh axes stay with the compiler. Raises InputError where P does not divide M or P R not L.
    """
    devices, parts = mesh.shape[axis], x.shape[0]
    layers = len(jax.tree.leaves(weights)[0])
    if parts % devices:
        raise InputError(f"{parts} micro-batches do not divide over {axis}={devices}; use a multiple of it")
    if layers % (devices * rounds):
        raise InputError(f"{layers} layers do not divide into {rounds} x {axis}={devices} stages; pad them")
    where, _ = mesh_here(mesh)
    dealt = jax.tree.map(lambda leaf: leaf.reshape(rounds, devices, -1, *leaf.shape[1:]), weights)
    whole, split = PartitionSpec(), PartitionSpec(axis)

    def own(weights: Tree, x: Array, given: Tree, shared: Tree) -> tuple[Array, Tree]:
        weights = jax.tree.map(lambda leaf: leaf[:, 0], weights)
        return _run(stage, weights, x, given, shared, _Clock(axis, devices, parts, rounds))

    y, sums = jax.shard_map(
        own,
        mesh=where,
        in_specs=(PartitionSpec(None, axis), split, whole, whole),
        out_specs=(split, PartitionSpec(None, axis)),
        axis_names={axis},
        # Checked, what a `shard_map` inside keeps for its gradient is laid out as if it were split over
        # this axis too, and does not compile (jax 0.10.2).
        check_vma=False,
    )(dealt, x, given, shared)
    return y, jax.tree.map(lambda leaf: leaf.reshape(layers, *leaf.shape[3:]), sums)


@dataclass(frozen=True)
class Schedule:
    """How many `micro_batches` a batch is cut into (0: as many as fit, to 4 a device), and their rounds."""

    micro_batches: int = 0
    rounds: int = 1

    def __post_init__(self) -> None:
        for name, least in (("micro_batches", 0), ("rounds", 1)):
            if getattr(self, name) < least:
                raise InputError(f"pipeline: {name}={getattr(self, name)} must be at least {least}")

    def parts(self, rows: int, devices: int, blocks: int) -> int:
        """M for a batch of `rows`, over so many devices, each micro-batch's rows in `blocks`.

        Raises InputError where no number of micro-batches fits, or not the one asked for.
        """
        fitting = [m for m in range(devices, rows + 1, devices) if rows % (m * blocks) == 0]
        asked = self.micro_batches
        if asked in fitting or (fitting and not asked):
            return asked or max((m for m in fitting if m <= 4 * devices), default=fitting[0])
        valid = ", ".join(map(str, fitting[:8])) or f"a multiple of {devices * blocks} rows"
        raise InputError(
            f"{rows} rows do not divide into {asked or 'any number of'} micro-batches over pipe={devices} "
            f"and {blocks} blocks of rows; use {valid}"
        )


class _Clock(NamedTuple):
    """Who does what when: device d works at turn t on number t - d of the R M (round, micro-batch)s."""

    axis: str
    devices: int
    parts: int
    rounds: int

    @property
    def turns(self) -> int:
        return self.parts * self.rounds + self.devices - 1

    @property
    def delay(self) -> int:
        """Turns that a micro-batch waits between two rounds."""
        return self.parts - self.devices

    def shift(self, x: Array, step: int) -> Array:
        """Each device's array to the device `step` after it."""
        pairs = [(device, (device + step) % self.devices) for device in range(self.devices)]
        return lax.ppermute(x, self.axis, pairs)


class _State(NamedTuple):
    """What a device holds between turns.

    stream   micro-batches on their way in, then out: slot t mod M/P moves one device back at turn t, so that
             the first device finds the next micro-batch and the last one room for the one that is done
    arrived  what the device before sent
    waiting  micro-batches between two rounds, used by the first device
    sums     of the layers here, over the micro-batches so far
    """

    stream: Array
    arrived: Array
    waiting: Array
    sums: Tree


def _run(
    stage: Stage, weights: Tree, x: Array, given: Tree, shared: Tree, clock: _Clock
) -> tuple[Array, Tree]:
    """The turns of one device; `weights [R, l, ...]`, `x [M / P, b, ...]`."""
    device = lax.axis_index(clock.axis)
    first = jax.tree.map(lambda leaf: leaf[0], (weights, x, given))

    def turn(state: _State, t: Array) -> tuple[_State, None]:
        number = t - device
        valid = (number >= 0) & (number < clock.parts * clock.rounds)
        round_, part = jnp.clip(number, 0) // clock.parts % clock.rounds, number % clock.parts
        slot = t % len(state.stream)
        coming = lax.dynamic_index_in_dim(state.stream, slot, keepdims=False)
        again, waiting = _exchange(state, t, clock)
        x = jnp.where(device == 0, jnp.where(t < clock.parts, coming, again), state.arrived)
        mine = jax.tree.map(lambda leaf: _row(leaf, round_), weights)
        y, sums = stage(mine, x, (jax.tree.map(lambda leaf: _row(leaf, part), given), shared))
        back = jnp.where(device == clock.devices - 1, y, clock.shift(coming, -1))
        stream = lax.dynamic_update_index_in_dim(state.stream, back, slot, 0)
        sums = jax.tree.map(lambda total, new: _added(total, new, round_, valid), state.sums, sums)
        return _State(stream, clock.shift(y, 1), waiting, sums), None

    zeros = jax.eval_shape(lambda w, x, g: stage(w, x, (g, shared))[1], *first)
    start = _State(
        x,
        jnp.zeros(x.shape[1:], x.dtype),
        jnp.zeros((clock.delay if clock.rounds > 1 else 0, *x.shape[1:]), x.dtype),
        jax.tree.map(lambda leaf: jnp.zeros((clock.rounds, *leaf.shape), leaf.dtype), zeros),
    )
    end, _ = lax.scan(turn, start, jnp.arange(clock.turns))
    done = jnp.roll(end.stream, 1 - clock.devices, axis=0)
    return done, jax.tree.map(lambda leaf: leaf[:, None], end.sums)


def _exchange(state: _State, t: Array, clock: _Clock) -> tuple[Array, Array]:
    """What has waited long enough for its next round, and the waiting with what has just arrived."""
    if not len(state.waiting):
        return state.arrived, state.waiting
    slot = t % clock.delay
    ready = lax.dynamic_index_in_dim(state.waiting, slot, keepdims=False)
    return ready, lax.dynamic_update_index_in_dim(state.waiting, state.arrived, slot, 0)


def _row(leaf: Array, index: Array) -> Array:
    return leaf[0] if len(leaf) == 1 else lax.dynamic_index_in_dim(leaf, index, keepdims=False)


def _added(total: Array, new: Array, index: Array, valid: Array) -> Array:
    """`total [R, ...]` with `new` added to its row, where the turn was one of work."""
    return total.at[index].add(jnp.where(valid, new, 0))


def micro_batches(x: Array, parts: int, mesh: Mesh, rows: tuple[str, ...], axis: str = "pipe") -> Array:
    """`x [B, ...]` as `[M, B / M, ...]`, each device keeping the rows that it has; see `whole_batch`.

    B lies over `(axis, *rows)`. Raises InputError where it does not divide into parts and devices.
    """
    devices, blocks = mesh.shape[axis], _blocks(mesh, rows)
    if parts % devices or x.shape[0] % (parts * blocks):
        raise InputError(
            f"{x.shape[0]} rows do not divide into {parts} micro-batches over {axis}={devices}"
            f"{''.join(f' and {name}={mesh.shape[name]}' for name in rows)}; "
            f"use a multiple of {-(-parts // devices) * devices * blocks} rows, or other micro-batches"
        )
    cut = x.reshape(devices, blocks, parts // devices, -1, *x.shape[1:])
    return cut.swapaxes(1, 2).reshape(parts, -1, *x.shape[1:])


def whole_batch(x: Array, mesh: Mesh, rows: tuple[str, ...], axis: str = "pipe") -> Array:
    """The inverse of `micro_batches`."""
    devices, blocks = mesh.shape[axis], _blocks(mesh, rows)
    cut = x.reshape(devices, x.shape[0] // devices, blocks, -1, *x.shape[2:])
    return cut.swapaxes(1, 2).reshape(-1, *x.shape[2:])


def _blocks(mesh: Mesh, rows: tuple[str, ...]) -> int:
    blocks = 1
    for name in rows:
        blocks *= mesh.shape[name]
    return blocks
