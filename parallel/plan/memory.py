"""Bytes that one device holds through a train step, by kind.

With N numbers of a model, d x f copies of it over data and fsdp, t tensor, p pipeline stages, and the
recipe's bytes a number:

    parameters  N/(t p) * parameter / f, and / d from ZeRO 3
    gradients   N/(t p) * gradient  / f, and / d from ZeRO 2
    optimizer   N/(t p) * optimizer / f, and / d from ZeRO 1
    activations tokens of a micro-batch on a device x bytes a token kept (`Remat`) x micro-batches in flight
    temporaries copies of parameters in the type of the products, gathered layers or tables, one's gradient,
                the accumulator's second half, and the largest of the layers' and the head's working sets

Norms and biases, which tensor parallelism leaves whole, are counted whole. Not modelled: fragmentation, the
compiler's own choices, and what a framework reserves (`Assumptions.reserve`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..mesh import MeshShape
from .layers import Layer, LayerTable, Recipe


@dataclass(frozen=True)
class Split:
    """How a step is divided.

    accumulate  micro-batches, computed one after another
    sequence    whether the stream between tensor-parallel products is split over the length too
    offload     whether the optimizer's state lives in the host's memory
    gathered    layers whose parameters are whole at once (the one in use and the next)
    interleave  parts of the model that a pipeline stage has in turn: a shorter bubble, more sent and kept
    """

    mesh: MeshShape
    zero: int = 0
    accumulate: int = 1
    sequence: bool = True
    offload: bool = False
    gathered: int = 2
    interleave: int = 1

    @property
    def shards(self) -> tuple[int, int, int]:
        """Into how many parts parameters, gradients and optimizer state are split beyond tensor and pipe."""
        data, fsdp = self.mesh.data, self.mesh.fsdp
        parameters, gradients, optimizer = (fsdp * (data if self.zero >= level else 1) for level in (3, 2, 1))
        return parameters, gradients, optimizer

    def tokens(self, batch: int, length: int) -> float:
        """Tokens of a micro-batch that one device computes."""
        mesh = self.mesh
        return batch * length / (mesh.data * mesh.fsdp * mesh.context * self.accumulate)

    @property
    def in_flight(self) -> float:
        """Micro-batches whose activations the first pipeline stage holds at once (one forward, one
        backward); interleaved, p (1 + (p-1)/(p v)) of them (Korthikanti et al., 2022, section 4.2.3).
        """
        pipe, parts = self.mesh.pipe, self.interleave
        held = pipe if parts == 1 else pipe + (pipe - 1) / parts
        return min(held, self.accumulate)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device by kind; `host` lies in its host's memory and is not in the total."""

    parameters: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    temporaries: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        """Bytes of device memory."""
        return sum(value for name, value in self.items() if name != "host")

    def items(self) -> list[tuple[str, float]]:
        """(kind, bytes)."""
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


def fixed_memory(table: LayerTable, recipe: Recipe, split: Split, batch: int, length: int) -> Memory:
    """Everything but the layers' kept activations; those of the ends are in."""
    numbers, largest = held_numbers(table, split.mesh)
    shards, gradient_shards, optimizer_shards = split.shards
    tokens = split.tokens(batch, length)
    gradients = numbers * recipe.gradient / gradient_shards
    optimizer = numbers * recipe.optimizer / optimizer_shards
    moving = numbers * recipe.compute / shards if recipe.copied else 0.0
    end = max((layer.held(split.mesh.tensor) for layer in table.ends), default=0.0)
    if shards > 1:
        moving += max(split.gathered * largest, end) * recipe.compute
    if gradient_shards > 1:
        moving += max(largest, end) * recipe.gradient
    if split.accumulate > 1:
        moving += gradients
    ends = sum(_kept(layer, split) for layer in table.ends)
    return Memory(
        parameters=numbers * recipe.parameter / shards,
        gradients=gradients,
        optimizer=0.0 if split.offload else optimizer,
        activations=ends * tokens,
        temporaries=moving + working_bytes(table, split, tokens),
        host=optimizer if split.offload else 0.0,
    )


def held_numbers(table: LayerTable, mesh: MeshShape) -> tuple[float, float]:
    """Numbers of the fullest stage on a device before ZeRO, and of its largest layer (ends left out).

    Embedding and head stand at different ends of a pipeline.
    """
    layers = [layer.held(mesh.tensor) for layer in table.layers]
    ends = [layer.held(mesh.tensor) for layer in table.ends]
    beside = sum(ends) if mesh.pipe == 1 else max(ends, default=0.0)
    return sum(layers) * stage_share(table, mesh.pipe) + beside, max(layers)


def stage_layers(table: LayerTable, pipe: int) -> int:
    """Layers of the fullest of `pipe` stages."""
    return -(-len(table.layers) // pipe)


def stage_share(table: LayerTable, pipe: int) -> float:
    """The part of the layers that the fullest stage has."""
    return stage_layers(table, pipe) / len(table.layers)


def stage_loads(table: LayerTable, pipe: int) -> tuple[tuple[float, tuple[Layer, ...]], ...]:
    """(part of the layers, ends) of the stages that can be the slowest: one of the fullest, with what stands
    before the layers, and the last, with what stands after them and the layers that are left.
    """
    if pipe == 1:
        return ((1.0, table.ends),)
    full, count = stage_layers(table, pipe), len(table.layers)
    left = max(0, count - (pipe - 1) * full)
    return (full / count, table.ends[:1]), (left / count, table.ends[1:])


def working_bytes(table: LayerTable, split: Split, tokens: float) -> float:
    """Bytes of the largest working set for so many tokens on a device."""
    tensor, sequence = split.mesh.tensor, split.sequence
    layers = (*table.layers, *table.ends)
    return max(min(layer.working(tensor, sequence) * tokens, layer.most) for layer in layers)


def _kept(layer: Layer, split: Split) -> float:
    return min(remat.kept(split.mesh.tensor, split.sequence) for remat in layer.remats)
