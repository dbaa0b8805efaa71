"""DoRA against the paper's formula; what holds for every method is in test_every_method.py."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.research.delta import DoRA, LoRA, attach


class Heads(nn.Module):
    """Kernels of three axes: features first split, then joined."""

    @nn.compact
    def __call__(self, x):
        heads = nn.DenseGeneral((2, 4), name="split")(x)
        return nn.DenseGeneral(6, axis=(-2, -1), name="join")(jnp.tanh(heads))


METHOD = DoRA(3, alpha=6.0)


def started(method=METHOD, model=None, address=""):
    """Tuned model, variables away from their start, parameters with biases, inputs, in double precision."""
    model = nn.Dense(8) if model is None else model
    x = jax.random.normal(jax.random.key(7), (2, 5, 12))
    params = model.init(jax.random.key(0), x)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf) + 0.1 * rng.normal(size=leaf.shape), params)
    tuned = attach(model, {address: method})
    variables = tuned.init(jax.random.key(1), params, x)
    moved = jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape), variables["delta"])
    return tuned, {**variables, "delta": moved}, params, x


def by_hand(node, kernel, scale=2.0):
    """The paper's equation 5 on a matrix `[in, out]`."""
    direction = kernel + scale * node["a"] @ node["b"]
    return node["magnitude"] * direction / np.linalg.norm(direction, axis=0)


def test_the_papers_formula(x64):
    tuned, variables, params, x = started()
    weight = by_hand(variables["delta"]["~dora"], params["kernel"])
    np.testing.assert_allclose(tuned.apply(variables, params, x), x @ weight + params["bias"], rtol=1e-9)
    merged = tuned.merge(params, variables)
    np.testing.assert_allclose(merged["kernel"], weight, rtol=1e-9)
    np.testing.assert_array_equal(merged["bias"], params["bias"])


def test_magnitudes_start_at_the_kernels_norms(x64):
    tuned, _, params, x = started()
    start = tuned.init(jax.random.key(1), params, x)["delta"]["~dora"]
    np.testing.assert_allclose(start["magnitude"], np.linalg.norm(params["kernel"], axis=0), rtol=1e-12)
    assert not start["b"].any()


@pytest.mark.parametrize("address", ["split", "join"])
def test_kernels_of_several_axes(address, x64):
    tuned, variables, params, x = started(model=Heads(), address=address)
    merged, kernel = tuned.merge(params, variables), params[address]["kernel"]
    node = variables["delta"][address]["~dora"]
    matrix = kernel.reshape(node["a"].shape[0], -1)
    np.testing.assert_allclose(merged[address]["kernel"], by_hand(node, matrix).reshape(kernel.shape))
    np.testing.assert_allclose(
        tuned.apply(variables, params, x), tuned.model.apply(merged, x), rtol=1e-9, atol=1e-12
    )


def test_the_norm_gets_no_gradient(x64):
    """The gradient is that of a formula in which the norm is a number, and not that of the whole formula."""
    tuned, variables, params, x = started()
    now = variables["delta"]["~dora"]
    fixed = np.linalg.norm(params["kernel"] + 2.0 * now["a"] @ now["b"], axis=0)

    def loss(delta):
        return jnp.sin(tuned.apply({"delta": {"~dora": delta}}, params, x)).sum()

    def written(delta, norm=None):
        direction = params["kernel"] + 2.0 * delta["a"] @ delta["b"]
        norm = jnp.linalg.norm(direction, axis=0) if norm is None else norm
        return jnp.sin(x @ (delta["magnitude"] * direction / norm) + params["bias"]).sum()

    got, wanted, whole = jax.grad(loss)(now), jax.grad(written)(now, fixed), jax.grad(written)(now)
    for name in ("a", "b", "magnitude"):
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-9, atol=1e-9)
    assert jnp.abs(got["b"] - whole["b"]).max() > 1e-2


def test_a_magnitude_of_zero_is_the_norm_and_an_empty_column_stays_finite(x64):
    tuned, variables, params, x = started()
    node = variables["delta"]["~dora"]
    node["magnitude"] = jnp.zeros_like(node["magnitude"])
    plain = params["kernel"] + 2.0 * node["a"] @ node["b"]
    np.testing.assert_allclose(tuned.merge(params, variables)["kernel"], plain, rtol=1e-12)
    empty = {**params, "kernel": params["kernel"].at[:, 2].set(0.0)}
    start = tuned.init(jax.random.key(1), empty, x)
    np.testing.assert_array_equal(tuned.apply(start, empty, x), tuned.model.apply(empty, x))
    gradients = jax.grad(lambda delta: tuned.apply({"delta": delta}, empty, x).sum())(start["delta"])
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_dropout_acts_on_all_of_the_input(x64):
    """`y + drop(x) (W' - W)`: with more outputs than inputs, what was dropped can be read off."""
    tuned, variables, params, x = started(DoRA(3, alpha=6.0, dropout=0.5), nn.Dense(16))
    change = by_hand(variables["delta"]["~dora"], params["kernel"]) - np.asarray(params["kernel"])
    train = tuned.apply(variables, params, x, train=True, rng=jax.random.key(3))
    added = np.asarray(train - tuned.model.apply(params, x)).reshape(-1, 16)
    seen = np.linalg.lstsq(change.T, added.T, rcond=None)[0].T / np.asarray(x).reshape(-1, 12)
    np.testing.assert_allclose(np.minimum(abs(seen), abs(seen - 2)), 0, atol=1e-9)
    assert 0.3 < (seen > 1).mean() < 0.7
    still = tuned.apply(variables, params, x) - tuned.model.apply(params, x)
    np.testing.assert_allclose(still, x @ change, rtol=1e-9, atol=1e-12)


def test_bad_fields_and_ranks_are_errors():
    with pytest.raises(InputError, match="DoRA rank=0 must be at least 1"):
        DoRA(0)
    with pytest.raises(InputError, match=r"DoRA dropout=1\.0 must be"):
        DoRA(dropout=1.0)
    with pytest.raises(InputError, match="DoRA rank=9 exceeds its 12x8 matrix; at most 8"):
        started(DoRA(9))


def test_before_other_methods_it_merges_and_behind_them_it_is_an_error(x64):
    tuned, _, params, x = started()
    both = attach(tuned.model, {"": [METHOD, LoRA(2)]})
    rng = np.random.default_rng(2)
    variables = both.init(jax.random.key(1), params, x)
    variables = jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape), variables)
    merged = both.merge(params, variables)
    np.testing.assert_allclose(both.apply(variables, params, x), tuned.model.apply(merged, x), rtol=1e-9)
    with pytest.raises(InputError, match="DoRA must come before LoRA here"):
        attach(tuned.model, {"": [LoRA(2), METHOD]}).init(jax.random.key(1), params, x)


def test_other_layers_of_a_stack_may_have_other_methods_first(decoder, tokens):
    model = decoder(layers=2, scan=True)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    apart = {"layers_{0}/attention/query": LoRA(2), "layers_{1}/attention/query": DoRA(2)}
    made = jax.eval_shape(attach(model, apart).init, jax.random.key(1), params, tokens)
    assert set(made["delta"]["layers"]["attention"]["query"]) == {"~lora", "~dora"}
    overlapping = {"layers_{0-1}/attention/query": LoRA(2), "layers_{1}/attention/query": DoRA(2)}
    with pytest.raises(InputError, match="DoRA must come before LoRA"):
        jax.eval_shape(attach(model, overlapping).init, jax.random.key(1), params, tokens)
