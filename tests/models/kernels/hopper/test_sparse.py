"""The kernels of chosen experts interpreted, with race detection, and compiled without a GPU."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from modicum.experiments.bench.attention_compiled import SHARED_MEMORY_LIMIT
from modicum.models.kernels.sparse import Experts, hopper, sparse_request
from modicum.models.kernels.sparse.gather import Gather
from modicum.models.kernels.sparse.hopper import SparseHopper
from modicum.models.kernels.sparse.mask import Mask

from .test_compiled import kernels_of

KERNEL = SparseHopper(interpret=InterpretGPUParams(detect_races=True))
pytestmark = pytest.mark.usefixtures("quick_compile")


def drawn(activation, gated, biased, size=32, experts=5, width=320):
    draw = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(draw.normal(0, 0.3, shape), jnp.bfloat16)

    return Experts(
        up=normal(experts, size, width),
        down=normal(experts, size, width),
        gate=normal(experts, size, width) if gated else None,
        up_bias=normal(experts, size) if biased else None,
        gate_bias=normal(experts, size) if biased and gated else None,
        activation=activation,
    )


def inputs(tokens, width=320):
    draw = np.random.default_rng(1)
    chosen = np.stack([draw.permutation(4)[:2] for _ in range(tokens)]).astype(np.int32)
    return jnp.asarray(draw.normal(size=(tokens, width)), jnp.bfloat16), jnp.asarray(chosen)


@pytest.mark.parametrize(
    ("activation", "gated", "biased", "size", "tokens"),
    [("silu", True, True, 48, 3), ("gelu_tanh", False, False, 32, 1)],
)
def test_interpreted_it_is_the_reference(activation, gated, biased, size, tokens):
    """Five tiles of x are more than are on their way at once; 48 neurons are three pieces."""
    gpu_callbacks.reset_gpu_interpret_mode_state()
    check(KERNEL, drawn(activation, gated, biased, size), *inputs(tokens))
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["relu", "relu2", "gelu_tanh", "silu", "sigmoid", "tanh"])
@pytest.mark.parametrize("tokens", [1, 64])
def test_on_a_gpu_it_is_the_reference(activation, tokens):
    experts = drawn(activation, gated=activation == "silu", biased=True, size=128, experts=32, width=4096)
    check(SparseHopper(), experts, *inputs(tokens, 4096))


def check(kernel, experts, x, chosen):
    """No more than twice the error that XLA makes in the same type."""
    assert kernel.supports(sparse_request(x, experts, chosen)) is None
    found = kernel(x, experts, chosen)
    assert found.dtype == x.dtype
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), experts)
    exact = Mask()(x.astype(jnp.float32), wide, chosen)
    plain = Mask()(x, experts, chosen)
    errors = [jnp.abs(each.astype(jnp.float32) - exact).max() for each in (found, plain)]
    assert errors[0] <= 2 * errors[1] + 2**-9 * jnp.abs(exact).max()


def test_its_gradients_are_those_of_gathered_experts(monkeypatch):
    """Whatever the kernel found: its place is taken here, as no gradient comes from it."""
    monkeypatch.setattr(hopper, "_compute", lambda interpret, *given: Gather()(*given))
    experts, (x, chosen) = drawn("relu", False, True), inputs(1)

    def loss(implementation):
        return lambda x, experts: implementation(x, experts, chosen).astype(jnp.float32).sum()

    found, expected = (jax.grad(loss(each), (0, 1))(x, experts) for each in (KERNEL, Gather()))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_what_it_cannot_do_has_a_reason():
    x, chosen = inputs(2)
    request = dataclasses.replace(sparse_request(x, drawn("relu", False, True), chosen), partitioned=False)
    assert "for Hopper GPUs, and this is a cpu" in SparseHopper().supports(request)
    assert (
        KERNEL.supports(request) is None and KERNEL.unfit(dataclasses.replace(request, experts=128)) is None
    )
    refused = [
        ({"dtype": "float32"}, "bfloat16 or float16, not float32"),
        ({"activation": "gelu"}, "gelu_tanh.*not gelu"),
        ({"size": 24}, "24×320 are not whole tiles of 16×64"),
        ({"tokens": 65}, "65 tokens are more than the 64 rows"),
    ]
    for changes, reason in refused:
        assert re.search(reason, KERNEL.supports(dataclasses.replace(request, **changes)))
    assert "may together choose the whole layer" in KERNEL.unfit(dataclasses.replace(request, tokens=20))


PROGRAM = """
import dataclasses, json
import jax
from modicum.experiments.bench.attention_compiled import compiled_kernels, maker, missing
from modicum.models.kernels.sparse import Experts
from modicum.models.kernels.sparse.hopper import SparseHopper

def compile_one(activation, gated, size, width, dtype, tokens):
    make = maker()
    matrix, bias = make((128, size, width), dtype), make((128, size), dtype)
    gate = (matrix, bias) if gated else (None, None)
    experts = Experts(matrix, matrix, gate[0], bias, gate[1], activation=activation)
    given = make((tokens, width), dtype), experts, make((tokens, 13), "int32")
    return compiled_kernels(f"{activation} {size}", lambda: jax.jit(SparseHopper()).lower(*given).compile())

cases = [("relu", False, 32, 1024, "bfloat16", 1), ("silu", True, 128, 4096, "bfloat16", 4),
         ("gelu_tanh", True, 48, 768, "float16", 2), ("relu2", False, 64, 768, "bfloat16", 1),
         ("tanh", False, 16, 768, "bfloat16", 1), ("sigmoid", False, 16, 768, "bfloat16", 1)]
reason = missing()
kernels = [] if reason else [dataclasses.asdict(kernel) for case in cases for kernel in compile_one(*case)]
print(json.dumps({"missing": reason, "kernels": kernels}))
"""


@pytest.mark.gpu_aot
def test_it_compiles_for_a_gpu_that_is_not_there():
    found = kernels_of(PROGRAM)
    names = [kernel["kernel"] for kernel in found]
    assert set(names) == {"sparse_neurons", "sparse_sums"} and names.count("sparse_neurons") == 6
    assert all(kernel["spill_stores"] == kernel["spill_loads"] == 0 for kernel in found)
    assert all(0 < kernel["shared_memory"] <= SHARED_MEMORY_LIMIT for kernel in found)
