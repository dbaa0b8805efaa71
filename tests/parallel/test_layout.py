from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec

from modicum import InputError
from modicum.parallel import Layout, MeshShape, make_mesh


class Tuple(NamedTuple):
    step: Any
    trainable: Any
    optimizer: Any
    ema: Any
    rng: Any


@flax.struct.dataclass
class Struct:
    step: Any
    trainable: Any
    optimizer: Any
    ema: Any
    rng: Any


@pytest.mark.parametrize("kind", [Tuple, Struct, dict])
def test_whole_states_are_laid_out_in_place(toy, kind):
    layout = Layout(make_mesh(MeshShape(data=2, fsdp=2, tensor=2)), zero=1, minimum=0)

    def start():
        params = toy.init(jax.random.key(0))
        moments = optax.adam(1e-3).init(params)
        return kind(
            step=jnp.zeros(()), trainable=params, optimizer=moments, ema=params, rng=jax.random.key(1)
        )

    shardings = layout.state(jax.eval_shape(start), toy.TABLE)
    state = jax.jit(start, out_shardings=shardings)()
    read = state.get if kind is dict else lambda name: getattr(state, name)
    assert isinstance(state, kind)
    assert read("trainable")["head"]["kernel"].sharding.spec == PartitionSpec("fsdp", "tensor")
    for average in (read("ema"), read("optimizer")[0].mu):
        assert average["head"]["kernel"].sharding.spec == PartitionSpec(("fsdp", "data"), "tensor")
    assert read("step").sharding.is_fully_replicated
    assert read("rng").sharding.is_fully_replicated


def test_models_without_a_table_train_over_data_and_fsdp_only(toy):
    params = jax.eval_shape(toy.init, jax.random.key(0))
    sharded = Layout(make_mesh(MeshShape(fsdp=8)), minimum=0).parameters(params, None)
    assert sharded["embedding"]["table"].spec == PartitionSpec("fsdp")
    with pytest.raises(InputError, match=r"^mesh axis tensor=2: the model has no axis table to split by; "):
        Layout(make_mesh(MeshShape(data=4, tensor=2))).parameters(params, None)


def test_single_is_one_device(toy):
    params = jax.eval_shape(toy.init, jax.random.key(0))
    shardings = jax.tree.leaves(Layout.single().parameters(params, toy.TABLE))
    assert all(len(sharding.device_set) == 1 for sharding in shardings)


def test_activations_lie_where_the_batch_does():
    layout = Layout(make_mesh(MeshShape(data=2, fsdp=2, context=2)))
    double = jax.jit(lambda x: layout.activations(x) * 2)
    assert double(jnp.ones((8, 6, 4))).sharding.spec == PartitionSpec(("data", "fsdp"), "context")
    assert str(jax.make_jaxpr(Layout.single().activations)(1.0)) == str(jax.make_jaxpr(lambda x: x)(1.0))
