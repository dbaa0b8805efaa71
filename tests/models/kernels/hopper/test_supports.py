"""What the Hopper implementation takes on and what it says of the rest."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models.kernels import (
    ALiBi,
    Bucketed,
    Causal,
    Dense,
    DenseBias,
    Full,
    Request,
    Segments,
    attention,
)
from modicum.models.kernels.hopper import Hopper
from modicum.models.kernels.registry import choose, implementations

REQUEST = Request("cpu", 2, 256, 256, 4, 2, 64, 64, "bfloat16", Causal(), None, False)
INTERPRETED = Hopper(interpret="anything")


@dataclasses.dataclass
class Device:
    compute_capability: str


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "bfloat16 or float16, not float32"),
        ({"width": 192}, "widths up to 128, not 192"),
        ({"mask": Dense(np.ones((1, 1, 1, 256), bool))}, "dense masks have a row for every query"),
        ({"mask": ~Dense(np.ones((1, 1, 256, 256), bool))}, "Dense does not show each query one range"),
        ({"bias": DenseBias(np.ones((1, 4, 1, 256), np.float32))}, "a row for every query"),
        ({"bias": Bucketed(np.ones((8, 4), np.float32), offset=jnp.array(1))}, "known when compiling"),
    ],
)
def test_what_it_cannot_do_it_names(changes, reason):
    assert reason in INTERPRETED.supports(dataclasses.replace(REQUEST, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mask": Dense(np.ones((1, 4, 256, 256), bool)) & Causal()},
        {"mask": Full(), "soft_cap": True, "sinks": True, "width": 100, "value_width": 24},
        {"mask": Causal() & Segments(np.ones((2, 256), np.int32)), "dtype": "float16"},
        {"bias": DenseBias(np.ones((1, 4, 256, 256), np.float32))},
        {"bias": ALiBi(np.ones(4, np.float32), offset=3), "dropout": 0.1},
    ],
)
def test_what_it_can_do(changes):
    assert INTERPRETED.supports(dataclasses.replace(REQUEST, **changes)) is None


def test_without_a_hopper_gpu_it_says_so(monkeypatch):
    assert Hopper().supports(REQUEST) == "it is for Hopper GPUs, and this is a cpu"
    on_gpu = dataclasses.replace(REQUEST, platform="gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device("8.0")])
    assert "capability 9 (Hopper), and this one's is 8.0" in Hopper().supports(on_gpu)
    monkeypatch.setattr(jax, "devices", lambda: [Device("9.0")])
    assert Hopper().supports(on_gpu) is None


def test_forced_on_a_cpu_it_raises():
    q = jnp.ones((1, 128, 2, 64), jnp.bfloat16)
    with pytest.raises(
        InputError, match="impl='hopper' cannot compute this attention: it is for Hopper GPUs"
    ):
        attention(q, q, q, mask=Causal(), impl="hopper")


def test_gradients_in_any_order_only_where_it_can_and_only_when_asked_for():
    assert choose(REQUEST, "auto").name != "hopper_fused"
    fused = dataclasses.replace(INTERPRETED, deterministic=False)
    assert fused.supports(REQUEST) is None
    assert [each.deterministic for each in implementations() if isinstance(each, Hopper)] == [True, False]
    assert "differ from run to run" in fused.unfit(REQUEST)
    assert "has no biases" in fused.supports(dataclasses.replace(REQUEST, bias=ALiBi(np.ones(4, np.float32))))
    assert "up to 64 in registers, not 128" in fused.supports(dataclasses.replace(REQUEST, width=128))
