"""Adapters against formulas written out by hand, on one Dense layer and on several kinds of module."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.research.delta import Adapter, Compacter, LowRankAdapter, ParallelAdapter, attach

X = np.random.default_rng(1).normal(size=(2, 5, 8)).astype(np.float32)


class Layer(nn.Module):
    """A dense layer from 8 to 12 features, and a module with two outputs."""

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(12, name="dense")(x)
        return Pair(name="pair")(y)[0]


class Pair(nn.Module):
    @nn.compact
    def __call__(self, y):
        return jnp.tanh(y), y.sum()


def tuned_layer(spec, scale=0.3):
    """Tuned model, its moved variables, parameters."""
    model = Layer()
    params = model.init(jax.random.key(0), X)["params"]
    tuned = attach(model, spec)
    variables = tuned.init(jax.random.key(1), params, X)
    rng = np.random.default_rng(2)
    moved = jax.tree.map(lambda leaf: leaf + scale * rng.normal(size=leaf.shape).astype("f4"), variables)
    return tuned, moved, params


def dense(params):
    return X @ params["dense"]["kernel"] + params["dense"]["bias"]


def test_the_sequential_adapter_reads_the_output():
    tuned, variables, params = tuned_layer({"dense": Adapter(3, "relu")})
    v, y = variables["delta"]["dense"]["~adapter"], dense(params)
    hidden = np.maximum(y @ v["down_kernel"] + v["down_bias"], 0)
    wanted = np.tanh(y + hidden @ v["up_kernel"] + v["up_bias"])
    np.testing.assert_allclose(tuned.apply(variables, params, X), wanted, atol=2e-6)


def test_the_parallel_adapter_reads_the_input():
    tuned, variables, params = tuned_layer({"dense": ParallelAdapter(3, "relu", scale=4.0)})
    v = variables["delta"]["dense"]["~parallel_adapter"]
    assert v["down_kernel"].shape == (8, 3) and v["up_kernel"].shape == (3, 12)
    hidden = np.maximum(X @ v["down_kernel"] + v["down_bias"], 0)
    wanted = np.tanh(dense(params) + 4.0 * (hidden @ v["up_kernel"] + v["up_bias"]))
    np.testing.assert_allclose(tuned.apply(variables, params, X), wanted, atol=5e-6)


def test_the_low_rank_adapter_multiplies_matrices_and_not_elements():
    tuned, variables, params = tuned_layer({"dense": LowRankAdapter(3, rank=2, activation="tanh")})
    v, y = variables["delta"]["dense"]["~low_rank_adapter"], dense(params)
    down, up = v["down_left"] @ v["down_right"], v["up_left"] @ v["up_right"]
    assert down.shape == (12, 4) and np.linalg.matrix_rank(down) == 2
    wanted = np.tanh(y + np.tanh(y @ down + v["down_bias"]) @ up + v["up_bias"])
    np.testing.assert_allclose(tuned.apply(variables, params, X), wanted, atol=2e-6)


METHODS = [Adapter(3), ParallelAdapter(3), LowRankAdapter(4), Compacter(3, 2)]


def matrix(rule, left, right):
    """A compacter's matrix as the paper writes it."""
    return sum(np.kron(rule[i], left[i] @ right[i]) for i in range(len(rule)))


@pytest.mark.parametrize("shared", [False, True], ids=["own rules", "shared rule"])
def test_the_compacter_sums_kronecker_products(shared):
    method = Compacter(3, n=2, rank=2, activation="relu", shared_rule=shared)
    tuned, variables, params = tuned_layer({"dense": method})
    v, y = variables["delta"]["dense"]["~compacter"], dense(params)
    rules = [v["rule"]] * 2 if shared else [v["down_rule"], v["up_rule"]]
    down, up = (matrix(rule, v[f"{way}_left"], v[f"{way}_right"]) for rule, way in zip(rules, ("down", "up")))
    assert down.shape == (12, 4) and up.shape == (4, 12)
    wanted = np.tanh(y + np.maximum(y @ down + v["down_bias"], 0) @ up + v["up_bias"])
    np.testing.assert_allclose(tuned.apply(variables, params, X), wanted, atol=2e-6)


def test_a_compacters_fixed_rule_is_one_for_all_sites_and_seeds():
    spec = {"dense": Compacter(3, 2, learn_rule=False), "pair": Compacter(6, 2, learn_rule=False)}
    model = Layer()
    params = model.init(jax.random.key(0), X)["params"]
    states = [attach(model, spec).init(jax.random.key(seed), params, X)["delta_state"] for seed in (1, 2)]
    rules = [
        s[p][n]["down_rule"] for s in states for p, n in (("dense", "~compacter"), ("pair", "~compacter_1"))
    ]
    assert all((rule == rules[0]).all() for rule in rules) and len(rules) == 4


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_of_two_outputs_the_first_is_adapted(method):
    tuned, variables, params = tuned_layer({"pair": method})
    base = tuned.model.apply(params, X)
    assert jnp.abs(tuned.apply(variables, params, X) - base).max() > 0.01


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_scaled_is_linear_in_what_is_added(method):
    tuned, variables, params = tuned_layer({"pair": method})
    own = variables["delta"]["pair"][f"~{method.name}"]

    def output(factor):
        delta = {"pair": {f"~{method.name}": method.scaled(own, factor)}}
        return tuned.apply({**variables, "delta": delta}, params, X)

    base = tuned.model.apply(params, X)
    np.testing.assert_allclose(output(0.0), base, atol=1e-6)
    np.testing.assert_allclose(output(-2.0) - base, -2 * (output(1.0) - base), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Adapter(0), "adapter width=0 must be at least 1"),
        (lambda: ParallelAdapter(activation="gelu_new"), "activation='gelu_new' is not one of gelu, relu"),
        (lambda: LowRankAdapter(rank=0), "low-rank adapter rank=0 must be at least 1"),
        (lambda: tuned_layer({"dense": LowRankAdapter(6, rank=3)}), "has 2 units for 12 features, fewer"),
        (lambda: tuned_layer({"dense": Compacter(3, n=8)}), "n=8 must divide its 12 features"),
        (lambda: tuned_layer({"dense": Compacter(16)}), "n=4 must divide its 0 units"),
        (lambda: tuned_layer({"dense": LowRankAdapter(32)}), "has 0 units for 12 features"),
    ],
    ids=["width", "activation", "rank", "rank of units", "blocks", "no block", "no units"],
)
def test_what_does_not_fit_is_an_error(make, said):
    with pytest.raises(InputError, match=said):
        make()


def test_integers_cannot_be_adapted():
    model, tokens = nn.Embed(10, 4), jnp.ones((2, 3), jnp.int32)
    params = model.init(jax.random.key(0), tokens)["params"]
    with pytest.raises(InputError, match="the root module: a parallel adapter needs an input"):
        attach(model, {"": ParallelAdapter(2)}).init(jax.random.key(1), params, tokens)
