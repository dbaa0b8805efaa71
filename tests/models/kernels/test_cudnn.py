"""What cuDNN is asked for, and why it is not; `jax.nn`'s own XLA path stands in where there is no GPU."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models.kernels import (
    Causal,
    Dense,
    DenseBias,
    Full,
    Lengths,
    Request,
    Segments,
    Terms,
    Window,
    attention,
)
from modicum.models.kernels.cudnn import CuDNN
from modicum.models.kernels.masks import describe
from modicum.models.kernels.reference import Reference

GOOD = Request("gpu", 2, 64, 64, 4, 2, 128, 128, "bfloat16", Causal(), None, False)
MASKS = [Full(), Causal(), Window(5, 0), Window(None, 0), Causal() & Window(5, None), Window(5, 3) & Causal()]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"platform": "cpu"}, "NVIDIA GPUs, not on cpu"),
        ({"dtype": "float32"}, "not float32"),
        ({"soft_cap": True}, "no soft cap"),
        ({"sinks": True}, "no sinks"),
        ({"dropout": 0.1}, "its dropout"),
        ({"bias": DenseBias(np.zeros((1, 1, 64, 64)))}, "gradient of a bias"),
        ({"lse": True}, "log-sum-exp"),
        ({"width": 132, "value_width": 132}, "multiples of 8 up to 256, not 132"),
        ({"width": 264, "value_width": 264}, "up to 256, not 264"),
        ({"value_width": 64}, "as wide as keys, not 64"),
        ({"keys": 65}, "as many keys as queries"),
        ({"mask": Causal(1)}, "it has no Causal"),
        ({"mask": Causal(np.array(0))}, "it has no Causal"),
        ({"mask": Window(5, 3)}, r"it has no Window\(5, 3\)"),
        ({"mask": Lengths(np.array([1, 2]))}, "it has no Lengths"),
        ({"mask": Causal() & Segments(np.zeros((2, 64), int))}, "it has no Causal & Segments"),
        ({"mask": Dense(np.ones((1, 1, 64, 64), bool))}, "it has no Dense"),
    ],
    ids=str,
)
def test_each_reason_is_named(change, reason):
    assert CuDNN().supports(GOOD) is None
    found = CuDNN().supports(dataclasses.replace(GOOD, **change))
    assert found is not None and re.search(reason, found) and ";" not in found


def test_before_hopper_heads_are_narrower(monkeypatch):
    for capability, widest in (("8.6", 128), ("9.0", 256), ("10.3", 256)):
        monkeypatch.setattr(
            jax, "devices", lambda found=capability: [SimpleNamespace(compute_capability=found)]
        )
        for width in (128, 192, 256):
            found = CuDNN().supports(dataclasses.replace(GOOD, width=width, value_width=width))
            assert (found is None) == (width <= widest)
            assert found is None or f"multiples of 8 up to 128, not {width}" in found


def test_all_reasons_come_at_once():
    q = jnp.ones((1, 4, 2, 6))
    with pytest.raises(InputError, match=r"impl='cudnn' cannot .*on cpu; .*float32; .*no soft cap; .*not 6"):
        attention(q, q, q, mask=Causal(), soft_cap=2.0, impl="cudnn")


@pytest.mark.parametrize("mask", MASKS, ids=describe)
def test_masks_are_spelled_as_jax_understands_them(monkeypatch, mask):
    assert CuDNN().supports(dataclasses.replace(GOOD, mask=mask)) is None
    plain = jax.nn.dot_product_attention

    def on_xla(*arrays, implementation, **options):
        assert implementation == "cudnn"
        return plain(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_xla)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 16, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    out, lse = CuDNN()(q, k, v, Terms(mask, scale=0.3))
    wanted, _ = Reference()(q, k, v, Terms(mask, scale=0.3))
    np.testing.assert_allclose(out, wanted, atol=1e-6)
    assert jnp.isnan(lse).all()
