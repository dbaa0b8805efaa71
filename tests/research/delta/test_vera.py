"""VeRA's product and its random matrices; what holds for every method is in test_every_method.py."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.research.delta import VeRA, attach, load_delta, parameter_count, save_delta

X = jax.random.normal(jax.random.key(7), (2, 5, 12))


class Net(nn.Module):
    """Two kernels of one shape, and one of three axes."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(12, name="second")(nn.Dense(12, name="first")(x))
        return nn.DenseGeneral((2, 4), name="split")(x)


def started(method, address="(first|second)"):
    params = Net().init(jax.random.key(0), X)["params"]
    tuned = attach(Net(), {address: method})
    return tuned, tuned.init(jax.random.key(1), params, X), params


def test_only_two_vectors_are_trained():
    _, variables, _ = started(VeRA(20))
    assert parameter_count(variables["delta"]) == 2 * (20 + 12)
    node = variables["delta"]["first"]["~vera"]
    np.testing.assert_array_equal(node["lambda_d"], np.full(20, 0.1, np.float32))
    assert not node["lambda_b"].any()


def test_sites_of_one_shape_share_their_matrices_which_the_seed_decides():
    _, variables, _ = started(VeRA(200))
    state = variables["delta_state"]
    jax.tree.map(np.testing.assert_array_equal, state["first"], state["second"])
    a, b = state["first"]["~vera"]["a"], state["first"]["~vera"]["b"]
    for matrix, bound in ((a, (6 / 12) ** 0.5), (b, (6 / 200) ** 0.5)):
        assert 0.99 * bound < jnp.abs(matrix).max() <= bound
        np.testing.assert_allclose(matrix.std(), bound / 3**0.5, rtol=0.05)
    again = started(VeRA(200, seed=1))[1]["delta_state"]["first"]["~vera"]
    assert jnp.abs(again["a"] - a).max() > 0.1


def test_a_file_holds_the_matrices_of_one_shape_once(tmp_path):
    tuned, variables, params = started(VeRA(200), "(first|second|split)")
    save_delta(tmp_path, tuned, variables, params)
    (file,) = tmp_path.glob("*.safetensors")
    numbers = (12 * 200 + 200 * 12 + 200 * 8) + 3 * 200 + 12 + 12 + 8  # split has the same A
    assert 4 * numbers < file.stat().st_size < 4 * numbers + 1500
    _, found = load_delta(tmp_path, tuned.model, params)
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(found)]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("address", ["first", "split"])
def test_the_product(address):
    tuned, variables, params = started(VeRA(20), address)
    trained, state = (variables[part][address]["~vera"] for part in ("delta", "delta_state"))
    rng = np.random.default_rng(0)
    trained["lambda_b"] = jnp.asarray(rng.normal(size=trained["lambda_b"].shape), jnp.float32)
    trained["lambda_d"] = jnp.asarray(rng.normal(size=20), jnp.float32)
    change = state["a"] @ np.diag(trained["lambda_d"]) @ state["b"] @ np.diag(trained["lambda_b"])
    merged = tuned.merge(params, variables)
    kernel = params[address]["kernel"]
    np.testing.assert_allclose(
        merged[address]["kernel"], kernel + change.reshape(kernel.shape), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        tuned.apply(variables, params, X), tuned.model.apply(merged, X), rtol=1e-4, atol=1e-4
    )


def test_dropout_acts_on_the_product_alone():
    tuned, variables, params = started(VeRA(20, dropout=0.5), "split")
    start = tuned.apply(variables, params, X, train=True, rng=jax.random.key(2))
    np.testing.assert_array_equal(start, tuned.model.apply(params, X))  # lambda_b is zero
    node = variables["delta"]["split"]["~vera"]
    node["lambda_b"] = node["lambda_b"] + 1.0
    runs = [tuned.apply(variables, params, X, train=True, rng=jax.random.key(i)) for i in (2, 2, 3)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert jnp.abs(runs[0] - runs[2]).max() > 0.01


def test_bad_fields_are_errors():
    for build, message in (
        (lambda: VeRA(0), "VeRA rank=0 must be at least 1"),
        (lambda: VeRA(dropout=-0.1), r"VeRA dropout=-0\.1 must be"),
        (lambda: started(VeRA(4), ""), "VeRA needs a module that multiplies its input by a 'kernel'"),
    ):
        with pytest.raises(InputError, match=message):
            build()
