"""What the tests of models share."""

import jax
import numpy as np
import pytest


@pytest.fixture(scope="session")
def random_parameters():
    """`(model, *args, **kwargs) -> params`: normal numbers everywhere, in biases and scales too.

    Nothing is compiled; and a test sees a bias that an initial zero would hide.
    """

    def make(model, *args, std=0.5, seed=0, **kwargs):
        numbers = np.random.default_rng(seed)
        shapes = jax.eval_shape(model.init, jax.random.key(0), *args, **kwargs)
        return jax.tree.map(lambda leaf: numbers.normal(0, std, leaf.shape).astype(leaf.dtype), shapes)

    return make
