import jax
import pytest
from jax.sharding import Mesh, PartitionSpec

from modicum import InputError
from modicum.parallel import DEFAULT_RULES, AxisRules, MeshShape, axis_names, make_mesh


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshShape(data=2, fsdp=2, tensor=2))


def shapes(tree):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, "float32"), tree, is_leaf=lambda x: isinstance(x, tuple)
    )


def test_names_come_from_the_first_row_that_matches_the_end_of_the_path():
    tree = shapes({"embedding": {"table": (8, 4)}, "position_embedding": {"table": (6, 4)}})
    table = ((r"embedding/table", ("vocab", "width")), (r"position_embedding/table", ("positions", "width")))
    names = axis_names(tree, table)
    assert names["embedding"]["table"] == ("vocab", "width")
    assert names["position_embedding"]["table"] == ("positions", "width")  # not the row `embedding/table`


def test_stacked_layers_have_one_axis_more():
    table = ((r"up/kernel", ("width", "mlp")),)
    scanned = axis_names(shapes({"encoder": {"layers": {"up": {"kernel": (3, 4, 8)}}}}), table)
    assert scanned["encoder"]["layers"]["up"]["kernel"] == ("layers", "width", "mlp")
    with pytest.raises(InputError, match=r"layers_0/up/kernel: shape \(3, 4, 8\) has 3 axes, .* names 2"):
        axis_names(shapes({"layers_0": {"up": {"kernel": (3, 4, 8)}}}), table)


def test_delta_leaves_have_no_names_unless_the_table_says_so():
    tree = shapes({"layers": {"query": {"~lora": {"a": (2, 32, 4), "b": (2, 4, 32)}}}})
    table = ((r"query/~lora/b", ("rank", "heads")),)
    names = axis_names(tree, table)["layers"]["query"]["~lora"]
    assert names == {"a": (None, None, None), "b": ("layers", "rank", "heads")}


def test_a_leaf_that_no_row_matches_is_named():
    with pytest.raises(InputError, match=r"^head/kernel: no row of the axis table matches .* \(4, 8\)$"):
        axis_names(shapes({"head": {"kernel": (4, 8)}}), ((r"up/kernel", ("width", "mlp")),))


def test_specs_leave_out_what_splits_nothing(mesh):
    spec = DEFAULT_RULES.spec
    assert spec(("vocab", "width"), (64, 32), mesh) == PartitionSpec("tensor")
    assert spec(("width", "mlp"), (32, 64), mesh) == PartitionSpec(None, "tensor")
    assert spec(("batch", "length"), (8, 6), mesh) == PartitionSpec(("data", "fsdp"))
    assert spec(("layers", None), (3, 5), mesh) == PartitionSpec()
    data_only = make_mesh(MeshShape(data=8))
    assert spec(("vocab", "width"), (63, 32), data_only) == PartitionSpec()


def test_collision_names_array_and_both_axes(mesh):
    rules = DEFAULT_RULES.replace(width="tensor")
    with pytest.raises(
        InputError, match=r"^mlp/up/kernel: .*'width' and 'mlp' both lie on mesh axis 'tensor'"
    ):
        rules.spec(("width", "mlp"), (32, 64), mesh, "mlp/up/kernel")


def test_a_size_that_does_not_divide_says_what_to_change(mesh):
    with pytest.raises(InputError) as error:
        DEFAULT_RULES.spec(("vocab", "width"), (50_257, 768), mesh, "embedding/table")
    assert str(error.value) == (
        "embedding/table: axis 'vocab' of size 50257 does not divide over tensor=2; pad it to 50258, "
        "choose a mesh whose tensor divides 50257, map 'vocab' to None in the rules, "
        "or list the array in `replicate`"
    )


def test_unknown_names_are_named(mesh):
    with pytest.raises(
        InputError, match=r"^head/kernel: unknown logical axis 'words'; the rules know batch, "
    ):
        DEFAULT_RULES.spec(("width", "words"), (4, 4), mesh, "head/kernel")
    with pytest.raises(
        InputError, match=r"^rule 'mlp' -> 'model': no such mesh axis; the axes are pipe, data"
    ):
        AxisRules({"mlp": "model"})
    with pytest.raises(InputError, match=r"shape \(4,\) has 1 axes, 2 names"):
        DEFAULT_RULES.spec(("width", "mlp"), (4,), mesh)
    foreign = Mesh(mesh.devices.reshape(-1), ("x",))
    with pytest.raises(InputError, match=r"up/bias: the mesh has no axis 'tensor'; it has x"):
        DEFAULT_RULES.spec(("mlp",), (4,), foreign, "up/bias")


def test_rules_are_values():
    assert hash(DEFAULT_RULES.replace()) == hash(DEFAULT_RULES)
    assert DEFAULT_RULES.replace(vocab=None) != DEFAULT_RULES
    assert DEFAULT_RULES.rules["vocab"] == "tensor"  # replace left the original alone
