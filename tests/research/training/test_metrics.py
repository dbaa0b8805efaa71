"""Rates on a clock that the test moves, and compiled memory."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from modicum.research.training.memory import CompiledMemory, compiled_memory
from modicum.research.training.metrics import DENSE_PEAKS, Throughput, dense_peak


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def devices(*kinds):
    return [SimpleNamespace(device_kind=kind) for kind in kinds]


def test_tokens_per_second_from_the_second_reading_on():
    clock = Clock()
    throughput = Throughput("tokens", None, devices("cpu"), clock)
    clock.now += 60  # compilation
    assert throughput.read(1000) == {}
    clock.now += 2
    assert throughput.read(3000) == {"tokens_per_second": 1500.0}
    clock.now += 1
    assert throughput.read(500) == {"tokens_per_second": 500.0}


def test_what_is_not_training_does_not_count():
    clock = Clock()
    throughput = Throughput("examples", None, devices("cpu"), clock)
    throughput.skip()  # before the first reading there is nothing to leave out
    throughput.read(0)
    clock.now += 50  # an evaluation
    throughput.skip()
    clock.now += 4
    assert throughput.read(8) == {"examples_per_second": 2.0}


def test_mfu_is_of_the_peak_of_all_devices():
    clock = Clock()
    throughput = Throughput("tokens", 6e9, devices("NVIDIA H200", "NVIDIA H200"), clock)
    throughput.read(0)
    clock.now += 1
    rates = throughput.read(100_000)
    assert rates["mfu"] == pytest.approx(100_000 * 6e9 / (2 * 989e12))


@pytest.mark.parametrize("kinds", [("cpu",), ("NVIDIA H200", "a chip of next year")])
def test_no_mfu_where_a_peak_is_not_known(kinds):
    clock = Clock()
    throughput = Throughput("tokens", 6e9, devices(*kinds), clock)
    throughput.read(0)
    clock.now += 1
    assert throughput.read(10) == {"tokens_per_second": 10.0}


def test_no_mfu_where_the_model_does_not_know_its_flops():
    clock = Clock()
    throughput = Throughput("tokens", None, devices("TPU v4"), clock)
    throughput.read(0)
    clock.now += 1
    assert "mfu" not in throughput.read(10)


def test_peaks_are_dense_ones():
    assert dense_peak("NVIDIA H100 80GB HBM3") == 989e12  # the data sheet's 1,979 is "with sparsity"
    assert dense_peak("cpu") is None
    assert all(1e14 < peak < 1e16 for peak in DENSE_PEAKS.values())


def test_donated_arguments_count_once():
    def add(x, y):
        return x + y

    x = jax.ShapeDtypeStruct((1000,), jnp.float32)
    plain = compiled_memory(jax.jit(add).lower(x, x).compile())
    donated = compiled_memory(jax.jit(add, donate_argnums=0).lower(x, x).compile())
    assert (plain.arguments, plain.outputs) == (8000, 4000)
    assert (donated.arguments, donated.outputs) == (8000, 0)
    assert CompiledMemory(1, 2, 4).total == 7
