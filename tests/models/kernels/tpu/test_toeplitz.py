"""The matrix of a relative bias and the sums of its diagonals, with registers as wide as a chip's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from modicum.models.kernels.tpu.toeplitz import diagonals, toeplitz


def table(values, rows):
    """Each of 8 rows moved by one, as `toeplitz` wants: place y of row r has `values[y - r]`."""
    return jnp.stack([jnp.roll(values, r) for r in range(8)])


@pytest.mark.parametrize(("rows", "columns"), [(128, 256), (256, 128)])
def test_each_diagonal_has_one_value(rows, columns):
    values = jnp.arange(rows + columns, dtype=jnp.float32)

    def kernel(window, out):
        out[...] = toeplitz(window[...], rows, columns, 128)

    shape = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
    found = pl.pallas_call(kernel, out_shape=shape, interpret=True)(table(values, rows))
    row, column = np.indices((rows, columns))
    np.testing.assert_array_equal(found, np.asarray(values)[column - row + rows])


def test_the_sums_of_diagonals_are_the_transpose():
    rows, columns = 128, 256
    rng = np.random.default_rng(0)
    window = rng.normal(size=(8, rows + columns)).astype(np.float32)
    tile = rng.normal(size=(rows, columns)).astype(np.float32)

    def run(function, given, shape):
        def kernel(x, out):
            out[...] = function(x[...])

        out = jax.ShapeDtypeStruct(shape, jnp.float32)
        return np.asarray(pl.pallas_call(kernel, out_shape=out, interpret=True)(given), np.float64)

    spread = run(lambda x: toeplitz(x, rows, columns, 128), window, tile.shape)
    summed = run(lambda x: diagonals(x, 128), tile, window.shape)
    np.testing.assert_allclose((spread * tile).sum(), (summed * window).sum(), rtol=1e-5)
    assert abs(summed).sum() > 0
