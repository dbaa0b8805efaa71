"""The cost of a compiled program, found by walking it: operations and bytes of each instruction, times the
trips of the loops around it.

XLA's own `cost_analysis` counts a loop's body once, and knows nothing of a kernel written by hand. Here

    time of an instruction = max(operations / rate of products, bytes / bandwidth),

where bytes are what it reads and writes in the device's large memory: of an array that is only sliced inside
a fusion, the slice; of one that is updated in place, the update; nothing that lies on the chip. Collectives
take their bytes over the links of the mesh axes on which they run.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from .groups import Collective, collective, collective_kind
from .hlo import Computation, Instruction, Program
from .products import product_flops
from .traffic import moved_bytes

FREE = {
    *("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "partition-id"),
    *("replica-id", "opt-barrier", "async-update", "domain", "iota", "add-dependency"),
}
NO_WORK = {"AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "Sharding", "AsyncCollectiveDone"}
KERNELS = {"tpu_custom_call", "mosaic_gpu_v2", "__gpu$xla.gpu.triton"}
TARGET = re.compile(r'custom_call_target="([^"]*)"')


@dataclass(frozen=True)
class Work:
    """Operations of products, bytes in the large memory and in the host's, of what is done so many times."""

    opcode: str
    flops: float
    bytes: float
    host: float
    times: int


@dataclass
class Walked:
    """What was found: work and collectives, and the loops whose trips the text does not say (taken as 1)."""

    works: list[Work] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    kernels: int = 0  # hand-written ones whose operations are not stated

    @property
    def flops(self) -> float:
        """Operations of all products on a device."""
        return sum(work.flops * work.times for work in self.works)

    @property
    def bytes(self) -> float:
        """Bytes read and written in a device's large memory."""
        return sum(work.bytes * work.times for work in self.works)

    def seconds(self, rate: float, bandwidth: float, pcie: float = math.inf) -> float:
        """Roofline time of everything but collectives, at so many operations and bytes a second."""
        return sum(
            work.times * max(work.flops / rate, work.bytes / bandwidth, work.host / pcie)
            for work in self.works
        )

    def merged(self) -> Walked:
        """The same with equal work, and equal collectives, written once for all their times."""
        works, collectives = Counter[Work](), Counter[Collective]()
        for work in self.works:
            works[replace(work, times=0)] += work.times
        for one in self.collectives:
            collectives[one._replace(times=0)] += one.times
        return Walked(
            [replace(work, times=times) for work, times in works.items()],
            [one._replace(times=times) for one, times in collectives.items()],
            list(self.unknown),
            self.kernels,
        )

    def sent(self) -> dict[tuple[str, tuple[str, ...]], tuple[int, float]]:
        """(how often, bytes a device sends in all) of each kind of collective over each set of axes."""
        found: dict[tuple[str, tuple[str, ...]], tuple[int, float]] = {}
        for one in self.collectives:
            count, size = found.get((one.kind, one.axes), (0, 0.0))
            found[one.kind, one.axes] = count + one.times, size + one.total
        return found


def walk(text: str, mesh: Mapping[str, int]) -> Walked:
    """Walk `compiled.as_text()` of a program partitioned over a mesh, axes and sizes in the mesh's order."""
    program, found = Program.parse(text), Walked()
    _Walk(program, dict(mesh), found).computation(program.entry, 1)
    return found


@dataclass
class _Walk:
    program: Program
    mesh: Mapping[str, int]
    found: Walked

    def computation(self, here: Computation, times: int) -> None:
        for one in here.instructions:
            if one.opcode not in FREE and not one.opcode.endswith("-done"):
                self._instruction(one, here, times)

    def _instruction(self, one: Instruction, here: Computation, times: int) -> None:
        if one.opcode == "while":
            trips = self.program.trips(one, here)
            if trips is None:
                self.found.unknown.append(one.name)
            self._call(one.called("body"), times * (1 if trips is None else trips))
        elif one.opcode == "conditional":
            self._dearest(one.branches, times)
        elif one.opcode in ("call", "async-start"):
            before = len(self.found.collectives)
            self._call(one.called("to_apply") or one.called("calls"), times)
            if one.opcode == "async-start":
                started = self.found.collectives[before:]
                self.found.collectives[before:] = [each._replace(background=True) for each in started]
        elif kind := collective_kind(one):
            size = _whole(one, kind, here)
            self._add(collective(one, kind, size, times, self.mesh, one.opcode.endswith("-start")))
        else:
            self._work(one, here, times)

    def _work(self, one: Instruction, here: Computation, times: int) -> None:
        inner = self.program.computations.get(one.called("calls") or "") if one.opcode == "fusion" else None
        if inner is not None:
            self._fused_collectives(inner, times)
        if one.opcode == "custom-call" and _target(one) in NO_WORK:
            return
        flops = self._flops(one, here)
        size, host = moved_bytes(one, here, inner)
        if flops or size or host:
            self.found.works.append(Work(one.opcode, flops, size, host, times))

    def _flops(self, one: Instruction, here: Computation) -> float:
        if one.opcode == "fusion":
            inner = self.program.computations[one.called("calls") or ""]
            return sum(self._flops(each, inner) for each in inner.instructions)
        flops = product_flops(one, here)
        self.found.kernels += one.opcode == "custom-call" and _target(one) in KERNELS and not flops
        return flops

    def _fused_collectives(self, inner: Computation, times: int) -> None:
        """Collectives inside a fusion: sums that are scattered, and those that TPUs start there.

        A started one appears again in each fusion that carries it on, and where it is done; only its start
        counts.
        """
        ends = {
            _target(one): one.operands for one in inner.instructions if _target(one).startswith("AsyncColl")
        }
        carried = set(inner.root.operands) if inner.root.opcode == "tuple" else set()
        for one in inner.instructions:
            kind = collective_kind(one)
            started = one.name in ends.get("AsyncCollectiveStart", ())
            done = one.name in ends.get("AsyncCollectiveDone", ()) or one.name in carried
            if kind is not None and (started or not done):
                scatters = inner.name.startswith("all-reduce-scatter")
                name = "reduce-scatter" if scatters and kind == "all-reduce" else kind
                self._add(collective(one, name, _whole(one, kind, inner), times, self.mesh, started))

    def _add(self, one: Collective | None) -> None:
        if one is not None:
            self.found.collectives.append(one)

    def _call(self, name: str | None, times: int) -> None:
        if name in self.program.computations:
            self.computation(self.program.computations[name or ""], times)

    def _dearest(self, branches: Iterable[str], times: int) -> None:
        """Of a conditional's branches the one with the most operations and bytes."""
        tried = []
        for name in branches:
            found = Walked()
            _Walk(self.program, self.mesh, found).computation(self.program.computations[name], times)
            tried.append(found)
        best = max(tried, key=lambda found: (found.flops, found.bytes), default=Walked())
        self.found.works += best.works
        self.found.collectives += best.collectives
        self.found.unknown += best.unknown
        self.found.kernels += best.kernels


def _whole(one: Instruction, kind: str, here: Computation) -> float:
    """Bytes of the array that a collective gathers, sums, scatters or moves, on one device.

    A start's arrays are its operands and its results.
    """
    given = sum(array.bytes for name in one.operands for array in here.arrays(name))
    made = sum(array.bytes for array in one.arrays)
    if one.opcode.endswith("-start") and kind != "all-reduce":
        made = max(0.0, made - given)
    return given if kind in ("reduce-scatter", "collective-permute", "all-to-all") else max(given, made)


def _target(one: Instruction) -> str:
    found = TARGET.search(one.text)
    return found[1] if found else ""
