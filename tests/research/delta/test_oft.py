"""OFT's rotation; what holds for every method is in test_every_method.py."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.research.delta import OFT, attach


class Net(nn.Module):
    """Kernels that contract the last axis, the last two, and one in the middle."""

    @nn.compact
    def __call__(self, x):
        heads = nn.DenseGeneral((2, 4), name="split")(x)
        mixed = nn.DenseGeneral(6, axis=(-2, -1), name="join")(heads)
        return nn.DenseGeneral(3, axis=1, name="time")(mixed)


def blocks_of(seed, count, size, scale=0.5):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=(count, size * (size - 1) // 2)))


def skew(row, size):
    matrix = np.zeros((size, size))
    matrix[np.triu_indices(size, 1)] = row
    return matrix - matrix.T


def test_the_rotation_is_cayleys_map_of_the_triangles(x64):
    blocks = blocks_of(0, 3, 4)
    rotation = OFT(4).rotation(blocks)
    for row, block in zip(np.asarray(blocks), rotation):
        q, identity = skew(row, 4), np.eye(4)
        np.testing.assert_allclose(block, (identity + q) @ np.linalg.inv(identity - q), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(block @ block.T, identity, atol=1e-12)
        np.testing.assert_allclose(np.linalg.det(block), 1.0, rtol=1e-9)


@pytest.mark.parametrize("terms", [4, 5, 8])
def test_the_series(terms, x64):
    blocks = blocks_of(1, 2, 4, scale=0.1)
    for row, block in zip(np.asarray(blocks), OFT(4, neumann_terms=terms).rotation(blocks)):
        powers = [np.linalg.matrix_power(skew(row, 4), k) for k in range(terms)]
        wanted = powers[0] + 2 * sum(powers[1:-1]) + powers[-1]
        np.testing.assert_allclose(block, wanted, rtol=1e-12, atol=1e-14)
    exact = OFT(4).rotation(blocks)
    errors = [jnp.abs(OFT(4, neumann_terms=k).rotation(blocks) - exact).max() for k in (terms, terms + 1)]
    assert errors[1] < errors[0] < 0.3 ** (terms - 1)


@pytest.mark.parametrize(
    ("address", "size", "count"), [("split", 4, 3), ("join", 4, 2), ("join", 8, 1), ("time", 5, 1)]
)
def test_the_input_is_rotated_whatever_axes_are_contracted(address, size, count, x64):
    x = jax.random.normal(jax.random.key(7), (2, 5, 12))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), Net().init(jax.random.key(0), x)["params"])
    tuned = attach(Net(), {address: OFT(size)})
    variables = tuned.init(jax.random.key(1), params, x)
    assert variables["delta"][address]["~oft"]["blocks"].shape == (count, size * (size - 1) // 2)
    blocks = variables["delta"][address]["~oft"]["blocks"] = blocks_of(2, count, size)
    kernel = np.asarray(params[address]["kernel"])
    whole = np.zeros((count * size, count * size))
    for index, block in enumerate(OFT(size).rotation(blocks)):
        whole[index * size : (index + 1) * size, index * size : (index + 1) * size] = block
    merged = tuned.merge(params, variables)
    wanted = (whole @ kernel.reshape(count * size, -1)).reshape(kernel.shape)
    np.testing.assert_allclose(merged[address]["kernel"], wanted, rtol=1e-9, atol=1e-12)
    moved = tuned.apply(variables, params, x)
    np.testing.assert_allclose(moved, Net().apply({"params": merged}, x), rtol=1e-9, atol=1e-12)
    assert jnp.abs(moved - Net().apply({"params": params}, x)).max() > 0.1
    # Lengths of the kernel's columns and angles between them are what they were.
    flat = np.asarray(merged[address]["kernel"]).reshape(count * size, -1)
    before = kernel.reshape(count * size, -1)
    np.testing.assert_allclose(flat.T @ flat, before.T @ before, rtol=1e-9, atol=1e-12)


def test_an_input_given_by_name(x64):
    class Named(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="out")(inputs=x)

    x = jax.random.normal(jax.random.key(7), (2, 8))
    params = Named().init(jax.random.key(0), x)["params"]
    tuned = attach(Named(), {"out": OFT(4)})
    variables = tuned.init(jax.random.key(1), params, x)
    variables["delta"]["out"]["~oft"]["blocks"] = blocks_of(3, 2, 4)
    merged = tuned.merge(params, variables)
    np.testing.assert_allclose(
        tuned.apply(variables, params, x), Named().apply({"params": merged}, x), rtol=1e-5, atol=1e-6
    )


def test_bad_fields_and_sizes_are_errors():
    x = jnp.ones((2, 12))
    params = nn.Dense(3).init(jax.random.key(0), x)["params"]
    for build, message in (
        (lambda: OFT(1), "OFT block_size=1 must be at least 2"),
        (lambda: OFT(4, neumann_terms=3), r"neumann_terms=3 must be 0 \(exact\) or at least 4"),
        (lambda: attach(nn.Dense(3), {"": OFT(5)}).init(jax.random.key(1), params, x), "12 inputs; 4 does"),
        (lambda: attach(nn.Dense(3), {"": OFT()}).init(jax.random.key(1), params, x), "12 inputs; 12 does"),
    ):
        with pytest.raises(InputError, match=message):
            build()
