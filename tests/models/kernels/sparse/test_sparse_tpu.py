"""The TPU kernel interpreted, against the masked reference, and compiled for chips that are not there.

libtpu (`pip install libtpu`) is looked for in the environment and in the folder MODICUM_LIBTPU.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum.models.kernels.sparse import Experts, sparse_request
from modicum.models.kernels.sparse.mask import Mask
from modicum.models.kernels.sparse.tpu import SparseTpu

E, N, D, K = 5, 16, 128, 3
KERNEL = SparseTpu(interpret=True)


def drawn(activation="relu", gated=False, biased=True, dtype=jnp.float32):
    draw = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(draw.normal(0, 0.3, shape), dtype)

    return Experts(
        up=normal(E, N, D),
        down=normal(E, N, D),
        gate=normal(E, N, D) if gated else None,
        up_bias=normal(E, N) if biased else None,
        gate_bias=normal(E, N) if biased and gated else None,
        activation=activation,
    )


def inputs(tokens=2, dtype=jnp.float32):
    draw = np.random.default_rng(1)
    chosen = np.stack([draw.permutation(E)[:K] for _ in range(tokens)]).astype(np.int32)
    return jnp.asarray(draw.normal(size=(tokens, D)), dtype), jnp.asarray(chosen)


@pytest.mark.parametrize(
    ("activation", "gated", "biased"), [("relu", False, True), ("silu", True, True), ("gelu", True, False)]
)
def test_interpreted_it_is_the_reference(activation, gated, biased):
    experts = drawn(activation, gated, biased)
    x, chosen = inputs()
    np.testing.assert_allclose(KERNEL(x, experts, chosen), Mask()(x, experts, chosen), rtol=1e-4, atol=1e-4)


def test_half_types_are_summed_in_float32():
    experts = drawn(dtype=jnp.bfloat16)
    x, chosen = inputs(dtype=jnp.bfloat16)
    found = KERNEL(x, experts, chosen)
    assert found.dtype == jnp.bfloat16
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), experts)
    expected = Mask()(x.astype(jnp.float32), wide, chosen)
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=0.02, atol=0.1)


def test_its_gradients_are_the_references():
    experts = drawn("silu", gated=True)
    x, chosen = inputs()

    def loss(implementation):
        return lambda x, experts: jnp.square(implementation(x, experts, chosen)).sum()

    found, expected = (jax.grad(loss(each), (0, 1))(x, experts) for each in (KERNEL, Mask()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), found, expected)


def test_what_it_cannot_do_has_a_reason():
    x, chosen = inputs()
    request = sparse_request(x, drawn(), chosen)
    assert "for TPUs, not cpu" in SparseTpu().supports(request)
    narrow = drawn().replace(up=jnp.zeros((E, N, 96)), down=jnp.zeros((E, N, 96)))
    assert "16×96 are not whole tiles of 8×128" in KERNEL.supports(sparse_request(x[:, :96], narrow, chosen))
    assert KERNEL.supports(request) is None
    large = drawn().replace(up=jnp.zeros((1, 8192, D)), down=jnp.zeros((1, 8192, D)), up_bias=None)
    assert KERNEL.supports(sparse_request(x, large, chosen[:, :1])) is None
    larger = replace(sparse_request(x, large, chosen[:, :1]), size=16384, width=512)
    assert "larger than on-chip memory" in KERNEL.supports(larger)
    assert (
        "2 tokens may together choose the whole layer" in KERNEL.unfit(sparse_request(x, drawn(), chosen))
        or request.partitioned
    )


PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
import importlib.util
if importlib.util.find_spec("libtpu") is None:
    print(json.dumps("libtpu is not installed")); raise SystemExit
from modicum.experiments.bench.attention_tpu import mesh_of
from modicum.models.kernels.sparse import Experts
from modicum.models.kernels.sparse.tpu import SparseTpu
from jax.sharding import NamedSharding, PartitionSpec
mesh = mesh_of(sys.argv[1], 1)
def shape(*sizes, dtype):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec()))
found = {}
CASES = ("float32", "relu", False), ("bfloat16", "silu", True), ("float32", "gelu", False)
for dtype, activation, gated in CASES:
    E, n, D = 8, 1280, 1024  # of float32 20 MiB at a time
    matrix = shape(E, n, D, dtype=dtype)
    bias = shape(E, n, dtype=dtype)
    gate = (matrix, bias) if gated else (None, None)
    experts = Experts(matrix, matrix, gate[0], bias, gate[1], activation=activation)
    given = shape(2, D, dtype=dtype), experts, shape(2, 6, dtype="int32")
    text = jax.jit(SparseTpu()).lower(*given).compile().as_text()
    found[f"{dtype} {activation}"] = text.count('custom_call_target="tpu_custom_call"')
print(json.dumps(found))
"""


@pytest.mark.tpu_aot
@pytest.mark.parametrize("chip", ["v5e", "v5p"])
def test_it_compiles_for_real_chips(chip):
    paths = [os.environ.get("MODICUM_LIBTPU"), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment["XLA_FLAGS"] = ""  # those of conftest.py are for CPUs; libtpu refuses what it does not know
    given = [sys.executable, "-c", PROGRAM, chip]
    result = subprocess.run(given, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout.splitlines()[-1])
    if isinstance(found, str):
        pytest.skip(f"{found} (or set MODICUM_LIBTPU)")
    assert found == {"float32 relu": 1, "bfloat16 silu": 1, "float32 gelu": 1}
