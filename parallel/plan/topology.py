"""How chips are joined, and how fast a collective over one mesh axis can be.

A TPU slice is a torus: a collective over an axis of the mesh uses the links of those of its dimensions on
which the axis lies. GPUs sit around a switch in their host, and hosts share a slower network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ... import InputError
from ..mesh import MESH_AXES, MeshShape
from .chips import Chip

WRAPPED = 16  # a dimension of a two-dimensional torus wraps around at this size (scaling-book, v5e and v6e)
CUBE = 4  # a three-dimensional one at all only where it is made of whole cubes of this edge (v4, v5p)


@dataclass(frozen=True)
class Topology:
    """Chips of one kind: a slice's shape, such as (4, 4, 4); for GPUs (hosts, GPUs of a host)."""

    chip: Chip
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        chip, size = self.chip, self.size
        if min(self.shape) < 1:
            raise InputError(f"topology {self}: every size must be at least 1")
        if chip.torus and len(self.shape) > chip.torus:
            raise InputError(
                f"topology {self}: chip {chip.name} is joined in {chip.torus} dimensions, such as 4x4"
            )
        if chip.torus and size > chip.pod:
            raise InputError(
                f"topology {self} has {size} chips; the largest slice of {chip.name} has {chip.pod}"
            )
        if not chip.torus:
            self._check_hosts()

    def _check_hosts(self) -> None:
        chip, size = self.chip, self.size
        if len(self.shape) > 2:
            raise InputError(
                f"topology {self}: {chip.name} takes hosts x GPUs of a host, such as 8x{chip.host}"
            )
        if len(self.shape) == 2 and self.shape[1] > chip.host:
            raise InputError(f"topology {self}: a host of {chip.name} has {chip.host}, not {self.shape[1]}")
        if len(self.shape) == 1 and size > chip.host and size % chip.host:
            raise InputError(f"topology {self}: {size} {chip.name} do not fill hosts of {chip.host}")

    @classmethod
    def parse(cls, chip: Chip, text: str) -> Topology:
        """Read `4x4x4` (TPU) or `8x8` or `64` (GPU: hosts x GPUs, or their number)."""
        parts = text.lower().split("x")
        if not all(part.isdecimal() for part in parts):
            raise InputError(f"topology {text!r} is no shape; give sizes joined by x, such as 4x4x4")
        return cls(chip, tuple(int(part) for part in parts))

    @property
    def size(self) -> int:
        """The number of chips."""
        return math.prod(self.shape)

    @property
    def host(self) -> int:
        """The chips used of each host."""
        return self.shape[1] if not self.chip.torus and len(self.shape) == 2 else self.chip.host

    def __str__(self) -> str:
        return "x".join(map(str, self.shape))

    def bandwidths(self, mesh: MeshShape) -> Mapping[str, float]:
        """Bytes/s that each chip sends in a ring over each mesh axis larger than 1, all rings at once.

        Torus: an axis of n of N chips lies on the share log n / log N of the torus's dimensions, and each of
        these has two links (one where it does not wrap around). Host: an axis inside a host has the switch;
        one that leaves it has the network of all its members in the host. Axes lie in the order of
        `MESH_AXES`, the last within a host.
        """
        rates: dict[str, float] = {}
        inside = 1  # chips that the axes so far, from the last, span
        for axis in reversed(MESH_AXES):
            size = getattr(mesh, axis)
            if size > 1:
                rates[axis] = self._on_torus(size) if self.chip.torus else self._on_hosts(size, inside)
                inside *= size
        return rates

    def _on_torus(self, size: int) -> float:
        dimensions = [extent for extent in self.shape if extent > 1]
        links = sum(2.0 if self._wraps(extent) else 1.0 for extent in dimensions)
        return self.chip.link * links * math.log(size) / math.log(self.size)

    def _wraps(self, extent: int) -> bool:
        if self.chip.torus == 2:
            return extent % WRAPPED == 0
        return len(self.shape) == 3 and all(each % CUBE == 0 for each in self.shape)

    def _on_hosts(self, size: int, inside: int) -> float:
        within = max(1, min(size, self.host // inside))
        if within == size:
            return self.chip.link
        return min(self.chip.link, self.chip.network * within)


def smaller_slices(chip: Chip) -> list[Topology]:
    """Slices of a chip from one chip up, each twice the last, as evenly shaped as their size allows."""
    limit = chip.pod or 2**15
    sizes = [2**power for power in range(limit.bit_length()) if 2**power <= limit]
    return [Topology(chip, _even(size, chip.torus) if chip.torus else (size,)) for size in sizes]


def _even(size: int, dimensions: int) -> tuple[int, ...]:
    power = size.bit_length() - 1
    return tuple(2 ** ((power + index) // dimensions) for index in range(dimensions))
