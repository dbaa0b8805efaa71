"""The mesh and the ZeRO level change where numbers lie, not what they are: on a model of forty lines.

`test_mesh_independence.py` shows the same for the real decoder and train step, at every level; this is its
quick part.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum.parallel import Layout, MeshShape, make_mesh

CASES = [("data=8", 3), ("data=4,tensor=2", 2), ("data=2,fsdp=2,tensor=2", 1), ("tensor=8", 0)]


@pytest.fixture(scope="module")
def alone(toy):
    """The same training on one device: (initial parameters, first gradients, losses)."""
    with jax.enable_x64(True):
        return toy.train(Layout.single(), 20, jnp.float64)


def test_the_job_learns(alone):
    """Else equal losses would mean little."""
    losses = alone[2]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(("mesh", "zero"), CASES)
def test_double_precision(toy, alone, mesh, zero, x64):
    layout = Layout(make_mesh(MeshShape.parse(mesh)), zero=zero, minimum=0)
    initial, grads, losses = toy.train(layout, 20, jnp.float64)
    jax.tree.map(np.testing.assert_array_equal, initial, alone[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), grads, alone[1])
    np.testing.assert_allclose(losses, alone[2], rtol=0, atol=1e-10)
