"""Tier 2: the kernels under the interpreter that follows each memory access, with two cores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from modicum.models.kernels import Bucketed, Causal, DenseBias, Full, Relations, Segments, Terms
from modicum.models.kernels.reference import Reference
from modicum.models.kernels.tpu import Blocks, Tpu, bias_gradient

WATCHED = Tpu(
    interpret=pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2),
    forward=Blocks(128, 128, 128),
    backward=Blocks(128, 128, 128),
)


def normal(*shape):
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape), jnp.float32)


def results(implementation, terms, heads=2, by=(0, 1, 2, 3)):
    """Output and gradients of q, k, v and bias, or of some of them."""

    def loss(q, k, v, bias):
        out, lse = implementation(q, k, v, Terms(terms.mask, bias, 0.1))
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum() + lse.sum()

    q, k, v = normal(1, 256, heads, 64), normal(1, 128, 1, 64), normal(1, 128, 1, 64) * 2
    found = jax.jit(jax.value_and_grad(loss, by, allow_int=True))(q, k, v, terms.bias)
    return [x for x in jax.tree.leaves(found) if x.dtype != jax.dtypes.float0]


def races_found():
    return interpret_pallas_call.races.races_found


CASES = {
    "packed": Terms(Causal(128) & Segments(np.repeat([[1, 2]], 128, 1), np.repeat([[1, 2]], 64, 1))),
    "dense bias": Terms(Full(), DenseBias(normal(1, 2, 256, 128))),
    "bucketed": Terms(Causal(128), Bucketed(normal(32, 2), max_distance=60)),
    "relations": Terms(
        Causal(128),
        Relations(
            normal(20, 2),
            np.arange(256)[None, :, None] % np.arange(1, 6),
            np.repeat([[0, 2, 4, 1]], 32, 1),
            np.arange(256)[None] % 50,
            np.arange(128)[None] % 40,
            buckets=16,
            max_distance=32,
        ),
    ),
}


@pytest.mark.parametrize(
    "name", ["packed", *(pytest.param(name, marks=pytest.mark.slow) for name in list(CASES)[1:])]
)
def test_no_race(name):
    pltpu.reset_tpu_interpret_mode_state()
    found, wanted = (results(i, CASES[name]) for i in (WATCHED, Reference()))
    assert not races_found()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), found, wanted)


def test_a_race_would_be_found(monkeypatch):
    """The tiles of a column add to the same block of a key bias: cores may not take them apart."""
    walk = bias_gradient._walk

    def too_parallel(*given):
        return walk(*given)._replace(parallel=3)

    monkeypatch.setattr(bias_gradient, "_walk", too_parallel)
    pltpu.reset_tpu_interpret_mode_state()
    results(WATCHED, Terms(Full(), DenseBias(normal(1, 1, 1, 128))), heads=1, by=(3,))
    assert races_found()
    pltpu.reset_tpu_interpret_mode_state()
