"""Seconds of a train step, by kind and by mesh axis.

For T tokens a step on each group of t tensor (and p pipe) devices, forward operations F a token and
recomputed R:

    compute   max(3 F T / (t p) / (peak x efficiency), weights read 3 times a micro-batch / bandwidth), and
              R T / (t p) / (peak x efficiency) with the traffic and the sums that are done again
    memory    (3 x bytes a token outside products T / (t p) + 2 x optimizer, 2 x parameters, gradients)
              / bandwidth
    data      ZeRO 0: 2 G (d-1)/d;  1: gradients and parameters once each;  2: gradients each micro-batch;
              3: parameters twice and gradients once each micro-batch
    fsdp      as ZeRO 3
    tensor    2 (t-1)/t x stream bytes x T x sums of forward, backward and recomputation
    context   3 (c-1) x bytes of keys and values x T / t (forward once; backward with their gradients)
    pipe      2 x stream bytes x T x interleaved parts / t;  bubble: (p-1)/(micro-batches x parts) of all
    offload   optimizer state to the host and back, over PCIe

Where a pipeline's stages differ, the slowest counts: the head is the last stage's. Bytes over a link are
divided by `Topology.bandwidths`; a ring's (n-1)/n is in. Communication over data, fsdp, context and pipe and
offloading hide behind `overlap` of the compute, what ZeRO 0 and 1 send over data, once a step, behind that of
one micro-batch; that over tensor does not hide. Latency is not modelled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .layers import Layer, LayerTable, Recipe
from .memory import Split, held_numbers, stage_loads, stage_share
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
    numbers, _ = held_numbers(table, mesh)
    reads = 3 * numbers * job.recipe.compute * split.accumulate / topology.chip.bandwidth

    def stage(share: float, ends: tuple[Layer, ...]) -> tuple[float, float]:
        layers = sum(layer_time(layer, topology, split, assume) for layer in table.layers) * share
        products = (layers + sum(layer_time(layer, topology, split, assume) for layer in ends)) * tokens
        again = recomputed * tokens * share / stage_share(table, mesh.pipe)
        traffic = _load(table, share, ends, lambda layer: layer.traffic)
        return max(products, reads) + again, _memory_time(job, topology, split, traffic * tokens)

    compute, memory = max((stage(*load) for load in stage_loads(table, mesh.pipe)), key=sum)
    communication = communication_times(job, topology, split)
    exposed = _exposed(communication, split, assume.overlap * compute)
    bubble = (compute + memory + exposed) * (mesh.pipe - 1) / split.accumulate
    bubble /= split.interleave
    return StepTime(compute, memory, communication, exposed, bubble)


def _load(table: LayerTable, share: float, ends: tuple[Layer, ...], cost: Callable[[Layer], float]) -> float:
    """A cost of one stage: its part of the layers, and its ends."""
    return sum(map(cost, table.layers)) * share + sum(map(cost, ends))


def _exposed(communication: Mapping[str, float], split: Split, window: float) -> float:
    """Seconds of communication that do not hide behind `window` seconds of a step's compute.

    ZeRO 0 and 1 send gradients once, when the last micro-batch's are there.
    """
    once = communication.get("data", 0.0) if split.zero < 2 else 0.0
    hidden = min(once, window / split.accumulate)
    tensor = communication.get("tensor", 0.0)
    rest = sum(communication.values()) - once - tensor
    return tensor + once - hidden + max(0.0, rest - (window - hidden))


def _memory_time(job: Job, topology: Topology, split: Split, traffic: float) -> float:
    recipe = job.recipe
    numbers, _ = held_numbers(job.table, split.mesh)
    _, _, shards = split.shards
    update = numbers / shards * (2 * recipe.optimizer + 2 * recipe.parameter + recipe.gradient)
    return (3 * traffic / split.mesh.tensor + update) / topology.chip.bandwidth


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
        sums = max(
            _load(job.table, share, ends, lambda layer: layer.stream * layer.reductions)
            for share, ends in stage_loads(job.table, mesh.pipe)
        )
        sent["tensor"] = 2 * (mesh.tensor - 1) / mesh.tensor * 2 * sums * tokens
    if mesh.context > 1:
        keys = sum(layer.keys for layer in layers) * stage_share(job.table, mesh.pipe)
        sent["context"] = 3 * (mesh.context - 1) * keys / mesh.tensor * tokens
        sent["context"] += 2 * recipe.gradient * numbers / split.shards[1] * (mesh.context - 1) / mesh.context
    if mesh.pipe > 1:
        handed = layers[0].stream / (mesh.tensor if split.sequence else 1)
        sent["pipe"] = 2 * handed * tokens * split.interleave
    return sent
