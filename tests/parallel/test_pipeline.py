"""A pipeline computes what its layers do one after the other, and its gradients are theirs."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from modicum import InputError
from modicum.parallel import MeshShape, make_mesh
from modicum.parallel.pipeline import micro_batches, pipeline, whole_batch

pytestmark = pytest.mark.usefixtures("quick_compile")

D, ROWS = 4, 4


def stage(weights, x, given):
    """A layer adds what its micro-batch is given and shares; sums up what it saw."""
    (own, shared) = given

    def layer(x, w):
        y = jnp.tanh(x @ w + own[:, None]) * shared
        return y, y.sum()

    return jax.lax.scan(layer, x, weights)


def one_after_the_other(weights, x, given, shared):
    y, sums = jax.vmap(lambda x, own: stage(weights, x, (own, shared)))(x, given)
    return y, sums.sum(0)


CASES = [("pipe=4,data=2", 8, 8, 1), ("pipe=2,tensor=2,data=2", 2, 4, 2), ("pipe=2,data=4", 6, 12, 3)]


@pytest.mark.parametrize(("shape", "parts", "layers", "rounds"), CASES)
def test_it_is_the_layers_one_after_the_other(shape, parts, layers, rounds, x64):
    mesh = make_mesh(MeshShape.parse(shape))
    rng = np.random.default_rng(0)
    weights, x, given = (rng.normal(size=s) for s in ((layers, D, D), (parts, ROWS, D), (parts, ROWS)))
    shared = np.asarray(rng.normal(size=D))

    def through(weights, x, given, shared):
        return pipeline(stage, weights, x, given, shared, mesh=mesh, rounds=rounds)

    def value(function):
        def scalar(*arrays):
            y, sums = function(*arrays)
            return jnp.sin(y).sum() + (sums * jnp.arange(layers)).sum(), (y, sums)

        return jax.jit(jax.value_and_grad(scalar, argnums=range(4), has_aux=True))

    arrays = [
        jax.device_put(weights, NamedSharding(mesh, PartitionSpec("pipe", None, "tensor"))),
        jax.device_put(x, NamedSharding(mesh, PartitionSpec("pipe", "data"))),
        *map(jnp.asarray, (given, shared)),
    ]
    compiled = value(through).lower(*arrays).compile()
    want = value(one_after_the_other)(*map(jnp.asarray, (weights, x, given, shared)))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11), compiled(*arrays), want)
    text = compiled.as_text()
    assert len(re.findall(r" collective-permute(?:-start)?\(", text)) == 4  # on and back, in both passes


def test_micro_batches_leave_rows_where_they_are(x64):
    mesh = make_mesh(MeshShape.parse("pipe=2,data=2,tensor=2"))
    x = jax.device_put(np.arange(16.0), NamedSharding(mesh, PartitionSpec(("pipe", "data"))))
    split = NamedSharding(mesh, PartitionSpec("pipe", "data"))
    cut = jax.jit(lambda x: micro_batches(x, 4, mesh, ("data",)), out_shardings=split)
    assert cut(x).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert not re.search("all-|collective", cut.lower(x).compile().as_text())
    np.testing.assert_array_equal(whole_batch(cut(x), mesh, ("data",)), x)


def test_what_does_not_divide_is_said():
    mesh = make_mesh(MeshShape.parse("pipe=4,data=2"))
    weights, x = jnp.zeros((6, D, D)), jnp.zeros((4, ROWS, D))
    with pytest.raises(InputError, match="6 layers do not divide into 1 x pipe=4 stages"):
        pipeline(stage, weights, x, mesh=mesh)
    with pytest.raises(InputError, match="3 micro-batches do not divide over pipe=4"):
        pipeline(stage, weights, x[:3], mesh=mesh)
    with pytest.raises(InputError, match="12 rows do not divide into 4 micro-batches over pipe=4 and data=2"):
        micro_batches(jnp.zeros((12, 2)), 4, mesh, ("data",))
