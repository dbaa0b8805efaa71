"""AdaLoRA's product and penalty; its budget is in training/test_rank_allocation.py."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.research.delta import AdaLoRA, attach
from modicum.research.training.objectives import LossSums, penalised

X = jax.random.normal(jax.random.key(7), (2, 5, 12))


def started(method, model=None):
    model = nn.Dense(8) if model is None else model
    params = model.init(jax.random.key(0), X)["params"]
    tuned = attach(model, {"": method})
    return tuned, tuned.init(jax.random.key(1), params, X), params


def test_the_start():
    _, variables, _ = started(AdaLoRA(8), nn.Dense(500))
    node = variables["delta"]["~adalora"]
    assert not node["e"].any() and node["e"].shape == (8,)
    assert node["a"].shape == (12, 8) and node["b"].shape == (8, 500)
    np.testing.assert_allclose(node["b"].std(), 0.02, rtol=0.05)
    assert jnp.abs(node["a"][:8] - node["b"][:, :8]).max() > 0.01


def test_the_product():
    tuned, variables, params = started(AdaLoRA(3, alpha=6.0))
    node = variables["delta"]["~adalora"]
    node["e"] = jnp.array([1.0, -2.0, 0.0])
    a, b = np.asarray(node["a"], np.float64), np.asarray(node["b"], np.float64)
    change = 6.0 / (3 + 1e-5) * a @ np.diag([1.0, -2.0, 0.0]) @ b
    np.testing.assert_allclose(
        tuned.apply(variables, params, X), tuned.model.apply(params, X) + X @ change, rtol=1e-5, atol=1e-6
    )
    merged = tuned.merge(params, variables)["kernel"]
    np.testing.assert_allclose(merged - params["kernel"], change, rtol=1e-3, atol=1e-7)


def test_the_penalty_is_the_distance_from_orthonormal_factors(x64):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 12, 3)), rng.normal(size=(2, 3, 8))
    method = AdaLoRA(3, orthogonality=0.5)
    wanted = sum(
        np.linalg.norm(a[layer].T @ a[layer] - np.eye(3)) + np.linalg.norm(b[layer] @ b[layer].T - np.eye(3))
        for layer in range(2)
    )
    stacked = {"a": jnp.asarray(a), "e": jnp.zeros((2, 3)), "b": jnp.asarray(b)}
    np.testing.assert_allclose(method.penalty(stacked), 0.5 * wanted, rtol=1e-12)


def test_orthonormal_factors_have_no_penalty_and_a_finite_gradient():
    variables = {"a": jnp.eye(12)[:, :3], "e": jnp.ones(3), "b": jnp.eye(8)[:3]}
    value, slopes = jax.value_and_grad(AdaLoRA(3).penalty)(variables)
    assert value == 0
    assert all(jnp.isfinite(leaf).all() and not leaf.any() for leaf in jax.tree.leaves(slopes))


def test_training_adds_the_penalty_and_evaluation_does_not():
    tuned, variables, _ = started(AdaLoRA(3, orthogonality=2.0))

    def loss(trainable, frozen, batch, rng):
        return LossSums(jnp.float32(6.0), jnp.float32(4.0), {})

    frozen, whole = {"delta_state": {}}, penalised(loss, tuned)
    added = tuned.penalty(variables)
    assert added > 1
    sums = whole(variables["delta"], frozen, {}, jax.random.key(0))
    np.testing.assert_allclose(sums.total, 6.0 + 4.0 * added, rtol=1e-6)
    assert whole(variables["delta"], frozen, {}, None).total == 6.0


def test_bad_fields_and_ranks_are_errors():
    for build, message in (
        (lambda: AdaLoRA(0), "AdaLoRA rank=0 must be at least 1"),
        (lambda: AdaLoRA(orthogonality=-1.0), r"AdaLoRA orthogonality=-1\.0 must be at least 0"),
        (lambda: started(AdaLoRA(9)), "AdaLoRA rank=9 exceeds its 12x8 matrix; at most 8"),
    ):
        with pytest.raises(InputError, match=message):
            build()
