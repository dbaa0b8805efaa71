"""The mesh: the devices of a run as a grid with named axes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from .. import InputError

# Slowest network first: neighbours on the last axis are neighbours in the machine. Tensor parallelism talks
# in every layer and stands last; pipeline stages exchange one activation per micro-batch and stand first.
MESH_AXES = ("pipe", "data", "fsdp", "expert", "context", "tensor")
BETWEEN_SLICES = ("pipe", "data", "fsdp")  # what may cross the network that joins slices


@dataclass(frozen=True)
class MeshShape:
    """How many ways each kind of parallelism splits the work; every axis defaults to 1.

    data     copies of the model, each with its own rows of the batch
    fsdp     as data, and each parameter is split over it as well
    tensor   heads, mlp width and vocabulary split
    context  the length of the sequence split
    pipe     layers split into stages
    expert   experts split
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    pipe: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        for axis, size in self.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise InputError(f"mesh axis {axis!r} has size {size!r}; a size is a whole number from 1")

    @classmethod
    def parse(cls, text: str) -> MeshShape:
        """Read `data=4,tensor=2`; axes not named have size 1."""
        sizes: dict[str, int] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            axis, _, number = (piece.strip() for piece in part.partition("="))
            if axis not in MESH_AXES:
                raise InputError(f"mesh {text!r}: unknown axis {axis!r}; the axes are {_axes()}")
            if axis in sizes:
                raise InputError(f"mesh {text!r}: axis {axis!r} is given twice")
            if not number.isdecimal():
                raise InputError(f"mesh {text!r}: {part!r} is no axis=size, such as {axis}=2")
            sizes[axis] = int(number)
        return cls(**sizes)

    def items(self) -> list[tuple[str, int]]:
        """(axis, size) for all six axes."""
        return [(field.name, getattr(self, field.name)) for field in fields(self)]

    @property
    def size(self) -> int:
        """The number of devices this shape fills."""
        product = 1
        for _, size in self.items():
            product *= size
        return product

    def over_slices(self, slices: int) -> tuple[int, ...]:
        """Into how many parts each of `MESH_AXES` is split by the network between so many slices.

        Raises InputError if pipe, data and fsdp together do not divide over them.
        """
        left, parts = slices, list[int]()
        for axis in MESH_AXES:
            parts.append(math.gcd(getattr(self, axis), left) if axis in BETWEEN_SLICES else 1)
            left //= parts[-1]
        if left > 1:
            raise InputError(
                f"mesh {self} over {slices} slices: {' x '.join(BETWEEN_SLICES)} must be a multiple of "
                f"{slices}, as the network between slices is too slow for the other axes; "
                f"add data={slices}"
            )
        return tuple(parts)

    def __str__(self) -> str:
        """What `parse` reads: the axes larger than 1."""
        return ",".join(f"{axis}={size}" for axis, size in self.items() if size > 1) or "data=1"


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lay the devices (default: all of every process) out as a mesh with all six axes.

    Every mesh of this project is made here, because `jax.make_mesh` makes axes of type Explicit by default,
    under which Linen modules fail; ours are Auto: the compiler places what we do not.

    Devices of several slices (TPU pods, NVLink domains) are laid out so that `pipe`, `data` and `fsdp`, in
    this order, cross the slow network between them and the other axes stay inside. Several hosts of one
    slice need nothing more: their devices follow one another, and the last axes take neighbours.

    Raises InputError if the shape does not fill the devices exactly, or not so that slices stay whole.
    """
    devices = jax.devices() if devices is None else list(devices)
    if shape.size != len(devices):
        raise InputError(
            f"mesh {shape} needs {shape.size} devices, {len(devices)} are here; "
            f"choose axis sizes whose product is {len(devices)}"
        )
    types = (AxisType.Auto,) * len(MESH_AXES)
    if len(slice_sizes(devices)) > 1:
        return Mesh(grid_over_slices(shape, devices), MESH_AXES, axis_types=types)
    sizes = tuple(getattr(shape, axis) for axis in MESH_AXES)
    # `jax.make_mesh` refuses most shapes on a torus, such as 32 x 2 on 4x4x4, where this splits its axes.
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=types)


def grid_over_slices(shape: MeshShape, devices: Sequence[Any]) -> np.ndarray:
    """The devices of several slices as an array with the axes of `MESH_AXES`, fast axes inside slices.

    Raises InputError for slices of different sizes, or if pipe, data and fsdp cannot take them.
    """
    counts = slice_sizes(devices)
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} of slice {index}" for index, count in sorted(counts.items()))
        raise InputError(f"mesh {shape}: slices must have equally many devices; there are {found}")
    outer = shape.over_slices(len(counts))
    inner = [getattr(shape, axis) // part for axis, part in zip(MESH_AXES, outer)]
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices=devices, allow_split_physical_axes=True)


def slice_sizes(devices: Sequence[Any]) -> Counter[int]:
    """How many of the devices each slice has; devices that know of no slices are of one."""
    return Counter(getattr(device, "slice_index", None) or 0 for device in devices)


def _axes() -> str:
    return ", ".join(field.name for field in fields(MeshShape))
