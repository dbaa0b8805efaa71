"""The search: mesh shapes x ZeRO level x micro-batches, and inside each the dynamic programme over layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from ... import InputError
from ..mesh import MeshShape
from .chips import Chip
from .costs import Assumptions, Job, StepTime, layer_time, recomputed_time, step_time
from .dynamic import Frontier, Option, frontier
from .layers import Layer
from .memory import Memory, Split, fixed_memory, stage_layers
from .refusals import Need, allowed, divisors, lacking, refuse, uncut
from .topology import Topology, smaller_slices

AXES = ("data", "fsdp", "tensor")
OFFLOADED = "offload"


@dataclass(frozen=True)
class Plan:
    """One way to run a job: how it is split, what each layer keeps, what that takes."""

    topology: Topology
    split: Split
    memory: Memory
    time: StepTime
    point: int
    front: Frontier = field(repr=False, compare=False)

    @property
    def choices(self) -> tuple[str, ...]:
        """How each layer of a pipeline stage keeps its activations."""
        return self.front.choices(self.point)

    def __str__(self) -> str:
        split = self.split
        levels = [f"ZeRO {split.zero} over data"] if split.mesh.data > 1 else []
        levels += ["ZeRO 3 over fsdp"] if split.mesh.fsdp > 1 else []
        return ", ".join([str(split.mesh), *levels, f"{split.accumulate} micro-batches"])


@dataclass(frozen=True)
class Search:
    """What may be chosen: mesh axes, remat policies, ZeRO levels, offloading, and what is assumed.

    mesh, accumulate  fixed where they are given;  interleave: see `Split`
    """

    axes: Sequence[str] = AXES
    remats: Sequence[str] = ("none", "dots", "full")
    levels: Sequence[int] = (0, 1, 2, 3)
    offload: bool = False
    sequence: bool = True
    mesh: MeshShape | None = None
    accumulate: int | None = None
    interleave: int = 1
    assume: Assumptions = Assumptions()

    def plans(self, job: Job, topology: Topology) -> list[Plan]:
        """Every way that fits, the fastest first; raises InputError where none does, with what would do."""
        found, needs = self._all(job, topology)
        if found:
            return sorted(found, key=_order)
        raise InputError(self._too_large(job, topology, needs))

    def smallest(self, job: Job, chip: Chip) -> Plan | None:
        """The best plan on the smallest slice of the chip on which any fits, None where none does.

        Raises InputError where a mesh is given that is the size of no slice.
        """
        slices = smaller_slices(chip)
        if self.mesh and self.mesh.size not in [candidate.size for candidate in slices]:
            raise InputError(
                f"mesh {self.mesh} has {self.mesh.size} devices; the slices of {chip.name} that are tried "
                f"have 1, 2, 4 and so on up to {slices[-1].size}"
            )
        for candidate in slices:
            try:
                found, _ = self._all(job, candidate)
            except InputError:  # nothing divides there
                continue
            if found:
                return min(found, key=_order)
        return None

    def _all(self, job: Job, topology: Topology) -> tuple[list[Plan], list[Need]]:
        """What fits, and what each split needs at least."""
        found, needs, fronts = [], [], {}
        for split in self.splits(job, topology):
            away = self._layers_for_host(job, split)
            key = (split.mesh.tensor, split.mesh.pipe, away)
            if key not in fronts:
                fronts[key] = self._front(job, topology, split, away)
            plan, need = self.evaluate(job, topology, split, fronts[key])
            needs.append(need)
            found += [plan] if plan is not None else []
        return found, needs

    def evaluate(
        self, job: Job, topology: Topology, split: Split, front: Frontier | None = None
    ) -> tuple[Plan | None, Need]:
        """The best plan of a split, None where none fits, and the least bytes that would do."""
        front = front or self._front(job, topology, split, self._layers_for_host(job, split))
        fixed = fixed_memory(job.table, job.recipe, split, job.batch, job.length)
        tokens = split.tokens(job.batch, job.length) * split.in_flight
        budget = topology.chip.memory * (1 - self.assume.reserve)
        least = Need(fixed.total + front.least * tokens, fixed.host)
        point = front.best((budget - fixed.total) / tokens)
        if point is None or fixed.host > self.assume.host:
            return None, least
        memory = replace(
            fixed,
            activations=fixed.activations + float(front.memory[point]) * tokens,
            host=fixed.host + _sent_away(job, split, front, point) * tokens if self.offload else fixed.host,
        )
        time = step_time(job, topology, split, self.assume, float(front.time[point]))
        return Plan(topology, split, memory, time, point, front), least

    def _layers_for_host(self, job: Job, split: Split) -> int:
        """How many of a stage's first layers the host has room for, whatever these keep.

        The first, because theirs is kept longest.
        """
        if not self.offload:
            return 0
        state = fixed_memory(job.table, job.recipe, split, job.batch, job.length).host
        tokens = split.tokens(job.batch, job.length) * split.in_flight
        kept = [max(_kept(layer, split).values()) for layer in job.table.layers]
        return max(0, int((self.assume.host - state) // (max(kept) * tokens)))

    def _front(self, job: Job, topology: Topology, split: Split, away: int) -> Frontier:
        """Remat of a stage's layers, of the first `away` also offloaded: bytes and seconds for each token."""
        stage = job.table.layers[: stage_layers(job.table, split.mesh.pipe)]
        links, chip = topology.bandwidths(split.mesh), topology.chip
        layers = []
        for number, layer in enumerate(stage):
            options = [
                Option(
                    remat.name,
                    remat.kept(split.mesh.tensor, split.sequence),
                    recomputed_time(layer, index, topology, split, self.assume, links),
                )
                for index, remat in enumerate(layer.remats)
                if remat.name in self.remats
            ]
            if not options:
                raise InputError(f"remat {', '.join(self.remats)}: {layer.name} knows none of these")
            if number < away:
                hidden = self.assume.overlap * layer_time(layer, topology, split, self.assume)
                options += [_offloaded(option, chip.pcie, hidden) for option in options]
            layers.append(options)
        return frontier(layers)

    def splits(self, job: Job, topology: Topology) -> Iterator[Split]:
        """Every split that divides; raises InputError, naming a reason, where none does."""
        meshes = [(mesh, refuse(job, mesh)) for mesh in self._meshes(topology)]
        good = [mesh for mesh, refusal in meshes if not refusal]
        if not good:
            why = meshes[0][1] if len(meshes) == 1 else allowed(job, self.axes, topology.size)
            raise InputError(
                f"no mesh over {', '.join(self.axes)} of {topology.size} devices divides the job: {why}"
            )
        if not any(self._micro_batches(job, mesh) for mesh in good):
            raise InputError(uncut(job, min(good, key=lambda mesh: mesh.pipe), self.accumulate))
        for mesh in good:
            for zero in self._levels(mesh):
                for accumulate in self._micro_batches(job, mesh):
                    for offload in (False, True)[: 1 + self.offload]:
                        yield Split(
                            mesh, zero, accumulate, self.sequence, offload, interleave=self.interleave
                        )

    def _meshes(self, topology: Topology) -> Iterable[MeshShape]:
        if self.mesh is None:
            return _shapes(topology.size, tuple(self.axes))
        if self.mesh.size != topology.size:
            raise InputError(
                f"mesh {self.mesh} needs {self.mesh.size} devices, topology {topology} has {topology.size}"
            )
        return (self.mesh,)

    def _levels(self, mesh: MeshShape) -> Sequence[int]:
        """ZeRO levels over data; 3 is what fsdp does, and is left to it where the search may choose fsdp."""
        if mesh.data == 1:
            return (0,)
        redundant = self.mesh is None and "fsdp" in self.axes
        return [level for level in self.levels if level < 3 or not redundant]

    def _micro_batches(self, job: Job, mesh: MeshShape) -> list[int]:
        rows = job.batch // (mesh.data * mesh.fsdp)
        counts = divisors(rows) if self.accumulate is None else (self.accumulate,)
        return [count for count in counts if rows % count == 0 and count >= mesh.pipe]

    def _too_large(self, job: Job, topology: Topology, needs: list[Need]) -> str:
        lack = lacking(topology, needs, self.assume)
        text = f"{job.table.name} does not fit {topology} {topology.chip.name}: {lack}"
        free = Search(self.axes, self.remats, self.levels, self.offload, self.sequence, assume=self.assume)
        enough = free.smallest(job, topology.chip)
        if enough is None:
            return f"{text}; no slice of {topology.chip.name} would do at batch {job.batch}"
        return f"{text}; the smallest slice that would do is {enough.topology} ({enough.topology.size} chips)"


def _kept(layer: Layer, split: Split) -> dict[str, float]:
    """Bytes a token that a layer keeps under each policy."""
    return {remat.name: remat.kept(split.mesh.tensor, split.sequence) for remat in layer.remats}


def _sent_away(job: Job, split: Split, front: Frontier, point: int) -> float:
    """Bytes a token that lie in the host's memory at a point of the front."""
    chosen = [name.partition(f"+{OFFLOADED}") for name in front.choices(point)]
    layers = zip(job.table.layers, chosen)
    return sum(_kept(layer, split)[name] for layer, (name, away, _) in layers if away)


def _order(plan: Plan) -> tuple[float, int, float, float]:
    """The fastest first; of equals that with fewer micro-batches, then less to hide: neither is free."""
    return plan.time.total, plan.split.accumulate, plan.time.moved, plan.memory.total


def _offloaded(option: Option, pcie: float, hidden: float) -> Option:
    """The option with what it keeps sent to the host and back, as far as that cannot hide."""
    slower = max(0.0, 2 * option.memory / pcie - hidden)
    return Option(f"{option.name}+{OFFLOADED}", 0.0, option.time + slower)


@lru_cache
def _shapes(size: int, axes: tuple[str, ...]) -> tuple[MeshShape, ...]:
    """All meshes of so many devices over these axes."""

    def fill(rest: int, names: tuple[str, ...]) -> Iterator[dict[str, int]]:
        if len(names) == 1:
            yield {names[0]: rest}
            return
        for part in divisors(rest):
            for others in fill(rest // part, names[1:]):
                yield {names[0]: part, **others}

    return tuple(MeshShape(**sizes) for sizes in fill(size, axes))
