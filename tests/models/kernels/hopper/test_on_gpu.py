"""The Hopper kernels on a Hopper GPU: `tests/gpu.sh` runs this and then measures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum.models.kernels import ALiBi, Bucketed, Causal, DenseBias, Full, Window
from modicum.models.kernels.hopper import Hopper

from .cases import CASES, Case, assert_within_twice_plain, draw, packed, values_and_gradients

pytestmark = pytest.mark.gpu

LARGER = (
    Case("causal, K=128", Causal(), 1024, 1024, batch=2, heads=8, kv_heads=2, width=128),
    Case("full, K=64", Full(), 1024, 1024, batch=2, heads=8, kv_heads=8, width=64, dtype=jnp.float16),
    Case("window, ragged", Window(300, 0), 1000, 1000, batch=2, heads=4, width=96, soft_cap=20.0),
    Case("packed causal", Causal() & packed(2, 1024, 7), 1024, 1024, batch=2, heads=4, width=128, sinks=True),
    Case("dense bias", Causal(), 1024, 1024, batch=3, heads=4, bias=DenseBias(draw(1, 4, 1024, 1024))),
    Case(
        "dense bias, one", Full(), 512, 640, batch=3, heads=4, width=128, bias=DenseBias(draw(3, 1, 512, 640))
    ),
    Case("bucketed", Full(), 1024, 1024, batch=2, heads=4, bias=Bucketed(draw(32, 4))),
    Case("bucketed, K=128", Causal(), 700, 700, heads=4, width=128, bias=Bucketed(draw(32, 4), False)),
    Case("ALiBi", Causal(), 1024, 1024, heads=4, width=128, bias=ALiBi(np.float32([0.5, 0.2, 0.1, 0.01]))),
)


@pytest.fixture(autouse=True)
def _hopper():
    if reason := Hopper().supports(_request()):
        pytest.skip(reason)


def _request():
    from modicum.models.kernels import Request

    return Request(jax.default_backend(), 1, 256, 256, 2, 2, 64, 64, "bfloat16", Full(), None, False)


@pytest.mark.parametrize("case", CASES + LARGER, ids=lambda case: case.name)
def test_within_twice_the_error_of_plain_attention(case):
    assert_within_twice_plain(case, jax.jit(Hopper().__call__))


def test_gradients_are_the_same_every_time():
    case = LARGER[0]
    first, second = (values_and_gradients(Hopper(), case.arrays(), case.terms()) for _ in range(2))
    for name, value in first.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(second[name]), err_msg=name)
