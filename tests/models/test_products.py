"""The product of activations with weights, values and gradients, whatever axes lead."""

import jax
import numpy as np
import pytest

from modicum.models.products import dense_product

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_values_and_gradients(leading, axis, backend, x64, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x, weights = RNG.normal(size=(*leading, 4)), RNG.normal(size=(4, 5))
    given = weights if axis == 0 else weights.T

    def product(x, weights):
        return dense_product(x, weights, (((len(leading),), (axis,)), ((), ())))

    y, pullback = jax.vjp(product, x, given)
    np.testing.assert_allclose(y, x @ weights, rtol=1e-12)
    dy = RNG.normal(size=y.shape)
    dx, dw = pullback(dy)
    np.testing.assert_allclose(dx, dy @ weights.T, rtol=1e-12)
    expected = np.einsum("na,nb->ab", x.reshape(-1, 4), dy.reshape(-1, 5))
    np.testing.assert_allclose(dw if axis == 0 else dw.T, expected, rtol=1e-12)


@pytest.mark.parametrize("backend,rank", [("cpu", 2), ("tpu", 3)])
def test_only_cpus_join_axes(backend, rank, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x, weights = np.ones((2, 3, 4)), np.ones((4, 5))
    jaxpr = jax.make_jaxpr(lambda x, w: dense_product(x, w, (((2,), (0,)), ((), ()))))(x, weights)
    (product,) = [equation for equation in jaxpr.eqns if equation.primitive.name == "dot_general"]
    assert product.invars[0].aval.ndim == rank
