import math

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from modicum import InputError
from modicum.parallel import DEFAULT_RULES, Layout, MeshShape, bytes_per_device, make_mesh

MESHES = {
    "8x1": MeshShape(data=8),
    "4x2": MeshShape(data=4, tensor=2),
    "2x2x2": MeshShape(data=2, fsdp=2, tensor=2),
    "1x8": MeshShape(tensor=8),
}
TENSOR_SPLIT = ("embedding/table", "up/kernel", "up/bias", "down/kernel", "head/kernel")


def layout(mesh="8x1", **options):
    return Layout(make_mesh(MESHES[mesh]), **{"minimum": 0, **options})


def abstract(toy):
    return jax.eval_shape(toy.init, jax.random.key(0))


def measured(tree):
    """Bytes that each device holds of a tree of real arrays, from their shards: one number, equal on all."""
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert len(set(held.values())) == 1, held
    return held[jax.devices()[0]]


def place_zeros(tree, shardings):
    """Real arrays of these shapes in these places."""
    return jax.tree.map(
        lambda leaf, sharding: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), sharding), tree, shardings
    )


def by_hand(params, shape, ways):
    """fp32 bytes per device: `tensor` splits the five kinds of leaf it should, the copies split by `ways`."""
    total = 0
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        tensor = shape.tensor if path.endswith(TENSOR_SPLIT) else 1
        total += 4 * math.prod(leaf.shape) // tensor // ways
    return total


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("mesh", MESHES)
def test_bytes_per_device(toy, mesh, zero):
    shape, where = MESHES[mesh], layout(mesh, zero=zero)
    params = abstract(toy)
    state = {"trainable": params, "optimizer": jax.eval_shape(optax.adamw(1e-3).init, params)}
    shardings = where.state(state, toy.TABLE)
    placed = place_zeros(state, shardings)
    gradients = where.gradients(params, toy.TABLE)

    # By hand: level 1 splits the moments over data as well, 2 the gradients, 3 the parameters.
    ways = [shape.fsdp * (shape.data if zero >= level else 1) for level in (1, 2, 3)]
    expected = [by_hand(params, shape, w) for w in ways]
    assert measured(placed["optimizer"]) == 2 * expected[0] + 4  # and Adam's counter
    assert measured(place_zeros(params, gradients)) == expected[1]
    assert measured(placed["trainable"]) == expected[2]
    assert bytes_per_device(params, gradients) == expected[1]
    assert bytes_per_device(state, shardings) == measured(placed)


def test_levels_only_refine(toy):
    """A moment's shards lie within its parameter's on the same device: gathering crosses `data` alone."""
    where = layout("2x2x2", zero=1)
    params = abstract(toy)
    coarse = where.parameters(params, toy.TABLE)
    fine = where.optimizer(params, params, toy.TABLE)
    for leaf, outer, inner in zip(*(jax.tree.leaves(tree) for tree in (params, coarse, fine))):
        outer_slices, inner_slices = (s.devices_indices_map(leaf.shape) for s in (outer, inner))
        assert inner.shard_shape(leaf.shape) != outer.shard_shape(leaf.shape)
        for device, slices in inner_slices.items():
            for part, whole, size in zip(slices, outer_slices[device], leaf.shape):
                assert set(range(size)[part]) <= set(range(size)[whole])


def test_zero_takes_the_largest_whole_dimension_and_shares_a_split_one_last():
    where = layout("2x2x2", zero=3)
    shapes = {"kernel": (16, 32), "bias": (32,), "wide": (8, 64)}
    leaves = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    table = (("kernel", ("width", "mlp")), ("bias", ("mlp",)), ("wide", (None, None)))
    specs = {name: sharding.spec for name, sharding in where.parameters(leaves, table).items()}
    assert specs == {
        "kernel": PartitionSpec(("fsdp", "data"), "tensor"),
        "bias": PartitionSpec(("tensor", "fsdp", "data")),
        "wide": PartitionSpec(None, ("fsdp", "data")),
    }


def test_rules_may_place_an_axis_that_zero_would():
    where = layout("2x2x2", zero=3, rules=DEFAULT_RULES.replace(width="fsdp"))
    leaf = {"kernel": jax.ShapeDtypeStruct((16, 32), jnp.float32)}
    spec = where.parameters(leaf, (("kernel", ("width", "mlp")),))["kernel"].spec
    assert spec == PartitionSpec("fsdp", ("tensor", "data"))


def test_small_arrays_stay_whole():
    leaves = {
        "large": jax.ShapeDtypeStruct((512,), "float32"),
        "small": jax.ShapeDtypeStruct((504,), "float32"),
    }
    shardings = layout(zero=3, minimum=512).parameters(leaves, ((".*", (None,)),))
    assert shardings["large"].spec == PartitionSpec("data")
    assert shardings["small"].spec == PartitionSpec()


def test_a_large_array_that_divides_nowhere_is_named_unless_replicated():
    leaves = {"head": {"kernel": jax.ShapeDtypeStruct((33, 31), "float32")}}
    table = (("head/kernel", ("width", "labels")),)
    with pytest.raises(InputError) as error:
        layout(zero=3).parameters(leaves, table)
    assert str(error.value) == (
        "head/kernel: no dimension of shape (33, 31) (already split as ()) divides over data=8; "
        "pad one, change the mesh, lower the ZeRO level, or list the array in `replicate`"
    )
    whole = layout(zero=3, replicate=("head/kernel",)).parameters(leaves, table)
    assert whole["head"]["kernel"].spec == PartitionSpec()


def test_replicate_also_answers_a_tensor_size_that_does_not_divide():
    leaves = {"embedding": {"table": jax.ShapeDtypeStruct((63, 32), "float32")}}
    table = (("embedding/table", ("vocab", "width")),)
    with pytest.raises(InputError, match="'vocab' of size 63 does not divide over tensor=2"):
        layout("4x2").parameters(leaves, table)
    where = layout("4x2", zero=1, replicate=("embedding/table",))
    moments = where.optimizer(jax.eval_shape(optax.adam(1.0).init, leaves), leaves, table)
    assert {sharding.spec for sharding in jax.tree.leaves(moments)} == {PartitionSpec()}


@pytest.mark.parametrize("zero", [-1, 4, "3", None])
def test_unknown_level(zero):
    with pytest.raises(InputError, match=r"^ZeRO level .*; the levels are 0, 1, 2, 3$"):
        layout(zero=zero)


def masked(params):
    mask = jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), params)
    return optax.masked(optax.adam(1e-3), mask)


def multi(params):
    labels = jax.tree_util.tree_map_with_path(
        lambda path, _: "adam" if "mlp" in jax.tree_util.keystr(path) else "frozen", params
    )
    return optax.multi_transform({"adam": optax.adamw(1e-3), "frozen": optax.set_to_zero()}, labels)


OPTIMIZERS = {
    "sgd": lambda params: optax.sgd(1e-3, momentum=0.9),
    "lion": lambda params: optax.lion(1e-3),
    "muon": lambda params: optax.contrib.muon(1e-3),
    "adafactor": lambda params: optax.adafactor(1e-3, min_dim_size_to_factor=8),
    "chain": lambda params: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lambda count: 1e-3)),
    "injected": lambda params: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3),
    "average": lambda params: optax.chain(optax.adam(1e-3), optax.ema(0.99)),
    "masked": masked,
    "multi": multi,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_state_is_laid_out(toy, name):
    """Each param-shaped leaf lies with its parameter's specification; every leaf can be placed."""
    where = layout("2x2x2", zero=1)
    params = abstract(toy)
    optimizer = OPTIMIZERS[name](params)
    state = jax.eval_shape(optimizer.init, params)
    shardings = where.optimizer(state, params, toy.TABLE)
    fine = {
        jax.tree_util.keystr(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(where.optimizer(params, params, toy.TABLE)),
        )
    }
    owned = 0
    for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(shardings)):
        assert isinstance(sharding, NamedSharding)
        owners = [
            s
            for key, (shape, s) in fine.items()
            if jax.tree_util.keystr(path).endswith(key) and shape == leaf.shape
        ]
        if owners:
            assert sharding == owners[0]
            owned += 1
        elif not leaf.shape:
            assert sharding.spec == PartitionSpec()
    assert owned > 0
    assert measured(place_zeros(state, shardings)) == bytes_per_device(state, shardings)


def test_factored_moments_are_split_only_when_large():
    params = {"up": {"kernel": jax.ShapeDtypeStruct((64, 4096), jnp.float32)}}
    state = jax.eval_shape(optax.adafactor(1e-3, min_dim_size_to_factor=8).init, params)
    table = (("up/kernel", ("width", "mlp")),)
    shardings = layout("8x1", zero=1, minimum=4096).optimizer(state, params, table)
    factored = shardings[0]
    assert factored.v_row["up"]["kernel"].spec == PartitionSpec()  # [64]
    assert factored.v_col["up"]["kernel"].spec == PartitionSpec("data")  # [4096]


def test_a_parameter_may_have_any_name():
    """`mu/mu` is the parameter `mu`'s first moment, not the parameter `mu` of another shape."""
    params = {"mu": jax.ShapeDtypeStruct((64,), "float32"), "count": jax.ShapeDtypeStruct((32, 8), "float32")}
    table = (("mu", ("mlp",)), ("count", (None, "vocab")))
    state = jax.eval_shape(optax.adam(1e-3).init, params)
    moments = layout("4x2").optimizer(state, params, table)[0]
    assert moments.mu["mu"].spec == PartitionSpec("tensor")
    assert moments.mu["count"].spec == PartitionSpec(None, "tensor")
    assert moments.count.spec == PartitionSpec()


def test_bare_array_as_parameters():
    params = jax.ShapeDtypeStruct((64, 8), "float32")
    state = jax.eval_shape(optax.adam(1e-3).init, params)
    shardings = layout(zero=1).optimizer(state, params, None)
    assert shardings[0].mu.spec == PartitionSpec("data")
    assert shardings[0].count.spec == PartitionSpec()
