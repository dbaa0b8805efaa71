from dataclasses import dataclass

import jax
import pytest
from jax.sharding import AxisType

from modicum import InputError
from modicum.parallel import MESH_AXES, MeshShape, make_mesh
from modicum.parallel.mesh import grid_over_slices


def test_parse_and_print_are_inverse():
    shape = MeshShape.parse("data=2, tensor=2,fsdp=2")
    assert shape == MeshShape(data=2, fsdp=2, tensor=2)
    assert shape.size == 8
    assert MeshShape.parse(str(shape)) == shape
    assert MeshShape.parse("") == MeshShape() == MeshShape.parse(str(MeshShape()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=2,model=4", "mesh 'data=2,model=4': unknown axis 'model'; the axes are data, fsdp, tensor"),
        ("data=2,data=4", "axis 'data' is given twice"),
        ("data", "'data' is no axis=size"),
        ("data=-1", "'data=-1' is no axis=size"),
        ("data=two", "'data=two' is no axis=size"),
        ("data=0", "mesh axis 'data' has size 0; a size is a whole number from 1"),
    ],
)
def test_unreadable_shapes_are_named(text, message):
    with pytest.raises(InputError, match=r"^[^\n]*$") as error:
        MeshShape.parse(text)
    assert message in str(error.value)


def test_mesh_has_all_axes_and_they_are_auto():
    mesh = make_mesh(MeshShape(data=4, tensor=2))
    assert mesh.axis_names == MESH_AXES
    assert mesh.shape["data"] == 4
    assert mesh.shape["tensor"] == 2
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_tensor_neighbours_are_neighbouring_devices():
    mesh = make_mesh(MeshShape(data=4, tensor=2))
    assert [device.id for device in mesh.devices.reshape(4, 2)[0]] == [0, 1]


def test_a_mesh_must_fill_the_devices():
    with pytest.raises(InputError, match=r"mesh data=4 needs 4 devices, 8 are here; choose .* product is 8$"):
        make_mesh(MeshShape(data=4))
    assert make_mesh(MeshShape(data=4), jax.devices()[:4]).size == 4


@dataclass(frozen=True)
class Chip:
    """A device that is not there: what laying out needs to know of one."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


def chips(slices, each):
    """Devices of slices, dealt out in turn: their order is not that of the slices."""
    return [Chip(index, index % slices) for index in range(slices * each)]


@pytest.mark.parametrize(
    ("text", "slices", "crossing"),
    [
        ("data=4,tensor=2", 2, {"data": 2}),
        ("data=2,fsdp=4,context=2", 4, {"data": 2, "fsdp": 2}),
        ("pipe=2,data=2,tensor=4", 2, {"pipe": 2}),
        ("data=3,fsdp=4", 6, {"data": 3, "fsdp": 2}),
    ],
)
def test_fast_axes_stay_inside_slices(text, slices, crossing):
    shape = MeshShape.parse(text)
    grid = grid_over_slices(shape, chips(slices, shape.size // slices))
    assert grid.shape == tuple(getattr(shape, axis) for axis in MESH_AXES)
    assert sorted(chip.id for chip in grid.flat) == list(range(shape.size))
    for place, axis in enumerate(MESH_AXES):
        lines = grid.swapaxes(0, place).reshape(grid.shape[place], -1).T
        crossed = {len({chip.slice_index for chip in line}) for line in lines}
        assert crossed == {crossing.get(axis, 1)}, axis


@pytest.mark.parametrize(
    ("text", "devices", "message"),
    [
        (
            "tensor=8",
            chips(2, 4),
            "mesh tensor=8 over 2 slices: pipe x data x fsdp must be a multiple of 2, as the network between",
        ),
        ("data=2,tensor=3", chips(3, 2), "pipe x data x fsdp must be a multiple of 3"),
        (
            "data=3",
            [Chip(0, 0), Chip(1, 0), Chip(2, 1)],
            "mesh data=3: slices must have equally many devices; there are 2 of slice 0, 1 of slice 1",
        ),
    ],
)
def test_meshes_that_would_tear_slices_are_refused(text, devices, message):
    with pytest.raises(InputError, match=r"^[^\n]*$") as error:
        grid_over_slices(MeshShape.parse(text), devices)
    assert message in str(error.value)
