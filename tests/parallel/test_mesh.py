import jax
import pytest
from jax.sharding import AxisType

from modicum import InputError
from modicum.parallel import MESH_AXES, MeshShape, make_mesh


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
