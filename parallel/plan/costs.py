"""Seconds of a train step, by kind and by mesh axis.

For T tokens a step on each group of t tensor (and p pipe) devices, forward operations F a token and
recomputed R:

    compute   max((3 F + R) T / (t p) / (peak x efficiency), weights read 3 times a micro-batch / bandwidth)
    memory    (3 x bytes a token outside products T / t + 2 x optimizer, gradients, parameters) / bandwidth
    data      ZeRO 0: 2 G (d-1)/d;  1: gradients and parameters once each;  2: gradients each micro-batch;
              3: parameters twice and gradients once each micro-batch
    fsdp      as ZeRO 3
    tensor    2 (t-1)/t x stream bytes x T x sums of forward, backward and recomputation
    context   3 (c-1) x bytes of keys and values x T (forward once; backward keys, values and their gradients)
    pipe      2 x stream bytes x T;  bubble: (p-1)/(micro-batches x interleaved parts) of everything
    offload   optimizer state to the host and back, over PCIe

Bytes over a link are divided by `Topology.bandwidths`; a ring's (n-1)/n is in. Communication over data,
fsdp, context and pipe hides behind `overlap` of the compute, that over tensor does not. Latency is not
modelled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .layers import Layer, LayerTable, Recipe
from .memory import Split, held_numbers, stage_share
from .topology import Topology


@dataclass(frozen=True)
class Assumptions:
    """What no data sheet says.

    efficiency  share of the peak that products reach; the default is the median over the published runs of
                docs/results/planner_validation.md, each of which it would have to be for a prediction
                without error
    overlap     share of the compute behind which communication can hide
    reserve     share of the memory that is not ours
    host        bytes of the host's memory for each chip; a TPU v5e host has 512 GiB for eight
    """

    efficiency: float = 0.55
    overlap: float = 0.8
    reserve: float = 0.05
    host: float = 64 * 2**30


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: what is computed and moved, what of it cannot hide, and the pipeline's idle
    share.
    """

    compute: float
    memory: float
    communication: Mapping[str, float] = field(hash=False)
    exposed: float = 0.0
    bubble: float = 0.0

    @property
    def total(self) -> float:
        """Seconds."""
        return self.compute + self.memory + self.exposed + self.bubble

    @property
    def moved(self) -> float:
        """Seconds of all communication, hidden or not."""
        return sum(self.communication.values())


@dataclass(frozen=True)
class Job:
    """What one step computes: rows, tokens of a row, and in which types."""

    table: LayerTable
    recipe: Recipe
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.length


def layer_time(layer: Layer, topology: Topology, split: Split, assume: Assumptions) -> float:
    """Seconds a token on a device of products of one layer, forward and backward, nothing recomputed."""
    return 3 * layer.flops / split.mesh.tensor / rate(topology, assume)


def rate(topology: Topology, assume: Assumptions) -> float:
    """Operations per second that products reach."""
    return topology.chip.flops(topology.chip.half) * assume.efficiency


def recomputed_time(
    layer: Layer,
    index: int,
    topology: Topology,
    split: Split,
    assume: Assumptions,
    links: Mapping[str, float],
) -> float:
    """Seconds a token that the layer's remat number `index` adds: products, sums over tensor, memory
    traffic.
    """
    remat, tensor = layer.remats[index], split.mesh.tensor
    again = remat.recomputed / tensor / rate(topology, assume)
    if remat.recomputed:
        again += layer.traffic / tensor / topology.chip.bandwidth
    if tensor > 1:
        again += 2 * (tensor - 1) / tensor * layer.stream * remat.reductions / links["tensor"]
    return again


def step_time(
    job: Job, topology: Topology, split: Split, assume: Assumptions, recomputed: float = 0.0
) -> StepTime:
    """Seconds of a step; `recomputed` are the seconds a token that remat adds on a device."""
    mesh, table = split.mesh, job.table
    tokens = split.tokens(job.batch, job.length) * split.accumulate
    layers, ends = (
        sum(layer_time(layer, topology, split, assume) for layer in group)
        for group in (table.layers, table.ends)
    )
    products = (layers * stage_share(table, mesh.pipe) + ends / mesh.pipe) * tokens
    numbers, _ = held_numbers(job.table, mesh)
    reads = 3 * numbers * job.recipe.compute * split.accumulate / topology.chip.bandwidth
    compute = max(products, reads) + recomputed * tokens
    memory = _memory_time(job, topology, split, tokens)
    communication = communication_times(job, topology, split)
    exposed = communication.get("tensor", 0.0)
    hideable = sum(seconds for axis, seconds in communication.items() if axis != "tensor")
    exposed += max(0.0, hideable - assume.overlap * compute)
    bubble = (compute + memory + exposed) * (mesh.pipe - 1) / split.accumulate
    bubble /= split.interleave
    return StepTime(compute, memory, communication, exposed, bubble)


def _memory_time(job: Job, topology: Topology, split: Split, tokens: float) -> float:
    mesh, recipe = split.mesh, job.recipe
    traffic = sum(layer.traffic for layer in (*job.table.layers, *job.table.ends))
    numbers, _ = held_numbers(job.table, mesh)
    _, _, shards = split.shards
    update = numbers / shards * (2 * recipe.optimizer + 2 * recipe.parameter + recipe.gradient)
    return (3 * traffic * tokens / mesh.tensor / mesh.pipe + update) / topology.chip.bandwidth


def communication_times(job: Job, topology: Topology, split: Split) -> dict[str, float]:
    """Seconds on the links by mesh axis (and of offloading), whether hidden or not."""
    links = topology.bandwidths(split.mesh)
    seconds = {axis: size / links[axis] for axis, size in communication_bytes(job, split).items()}
    if split.offload:
        numbers, _ = held_numbers(job.table, split.mesh)
        state = numbers / split.shards[2] * job.recipe.optimizer
        seconds["offload"] = 2 * state / topology.chip.pcie
    return seconds


def communication_bytes(job: Job, split: Split) -> dict[str, float]:
    """Bytes that each device sends a step, by mesh axis larger than 1."""
    mesh, recipe, micro = split.mesh, job.recipe, split.accumulate
    tokens = split.tokens(job.batch, job.length) * micro
    numbers, _ = held_numbers(job.table, mesh)
    whole = (2 * recipe.compute + recipe.gradient) * numbers * micro  # parameters twice, gradients once
    sent: dict[str, float] = {}
    if mesh.fsdp > 1:
        sent["fsdp"] = whole * (mesh.fsdp - 1) / mesh.fsdp
    if mesh.data > 1:
        by_level = {
            0: 2 * recipe.gradient * numbers,
            1: (recipe.gradient + recipe.parameter) * numbers,
            2: (recipe.gradient * micro + recipe.parameter) * numbers,
            3: whole,
        }
        sent["data"] = by_level[split.zero] / mesh.fsdp * (mesh.data - 1) / mesh.data
    layers = job.table.layers
    if mesh.tensor > 1:
        sums = sum(layer.stream * layer.reductions for layer in layers) / mesh.pipe
        ends = sum(layer.stream * layer.reductions for layer in job.table.ends)
        sent["tensor"] = 2 * (mesh.tensor - 1) / mesh.tensor * 2 * (sums + ends) * tokens
    if mesh.context > 1:
        sent["context"] = 3 * (mesh.context - 1) * sum(layer.keys for layer in layers) / mesh.pipe * tokens
        sent["context"] /= mesh.tensor
        sent["context"] += 2 * recipe.gradient * numbers / split.shards[1] * (mesh.context - 1) / mesh.context
    if mesh.pipe > 1:
        sent["pipe"] = 2 * layers[0].stream * tokens / (mesh.tensor if split.sequence else 1)
    return sent
