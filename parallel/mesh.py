"""The mesh: the devices of a run as a grid with named axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import jax
from jax.sharding import AxisType, Mesh

from .. import InputError

# Slowest network first: neighbours on the last axis are neighbours in the machine. Tensor parallelism talks
# in every layer and stands last; pipeline stages exchange one activation per micro-batch and stand first.
MESH_AXES = ("pipe", "data", "fsdp", "expert", "context", "tensor")


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

    def __str__(self) -> str:
        """What `parse` reads: the axes larger than 1."""
        return ",".join(f"{axis}={size}" for axis, size in self.items() if size > 1) or "data=1"


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lay the devices (default: all of every process) out as a mesh with all six axes.

    Every mesh of this project is made here, because `jax.make_mesh` makes axes of type Explicit by default,
    under which Linen modules fail; ours are Auto: the compiler places what we do not.

    Raises InputError if the shape does not fill the devices exactly.
    """
    devices = jax.devices() if devices is None else list(devices)
    if shape.size != len(devices):
        raise InputError(
            f"mesh {shape} needs {shape.size} devices, {len(devices)} are here; "
            f"choose axis sizes whose product is {len(devices)}"
        )
    sizes = tuple(getattr(shape, axis) for axis in MESH_AXES)
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def _axes() -> str:
    return ", ".join(field.name for field in fields(MeshShape))
