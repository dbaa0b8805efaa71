"""Which collectives the real compiler for TPUs puts into the real train step, compiled for chips not here.

Bytes are what a device sends in a step, as `parallel.plan.walk` counts them. libtpu
(`pip install libtpu`) is looked for in the environment and in the folder MODICUM_LIBTPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.tpu_aot

PROGRAM = """
import json, math, runpy, sys
import jax
from modicum import InputError
from modicum.parallel import MeshShape, bytes_per_device, make_mesh
from modicum.parallel.plan.target import tpu_devices
from modicum.parallel.plan.walk import walk
from modicum.research.planning.compiled import Elsewhere
decoder = runpy.run_path(sys.argv[1])
try:
    devices = tpu_devices("v5e:2x4")
except InputError as error:
    print(json.dumps({"missing": str(error)}))
    raise SystemExit
found = {"missing": ""}
for case in sys.argv[2:]:
    mesh, zero = case.split(":")
    layout = Elsewhere(make_mesh(MeshShape.parse(mesh), devices), zero=int(zero), minimum=0)
    lowered = decoder["lowered"](layout)
    state = lowered.in_avals[0][0]
    compiled = lowered.compile()
    sent = walk(compiled.as_text(), layout.mesh.shape).sent()
    taken = layout.state(state, decoder["model_of"]().axes)
    found[case] = {
        "sent": [[kind, list(axes), count, size] for (kind, axes), (count, size) in sent.items()],
        "parameters": sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(state.trainable)),
        "predicted": bytes_per_device(state, taken),
        "arguments": compiled.memory_analysis().argument_size_in_bytes,
    }
print(json.dumps(found))
"""
CASES = ["data=8:0", "data=8:1", "data=8:3", "tensor=8:0", "context=8:0"]


@pytest.fixture(scope="module")
def compiled():
    paths = [os.environ.get("MODICUM_LIBTPU"), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "JAX_PLATFORMS": "cpu"}
    environment |= {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"
    }  # nothing is run: several compilers may share a machine
    decoder = Path(__file__).with_name("decoder.py")
    environment["XLA_FLAGS"] = ""  # those of conftest.py are for CPUs; libtpu refuses what it does not know
    given = [sys.executable, "-c", PROGRAM, str(decoder), *CASES]
    result = subprocess.run(given, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout.splitlines()[-1])
    if found["missing"]:
        pytest.skip(f"{found['missing']} (or set MODICUM_LIBTPU)")
    return found


def sent(found, case):
    """Bytes that a device sends in a step, by kind of collective and axes."""
    return {(kind, *axes): size for kind, axes, _, size in found[case]["sent"]}


def test_zero_0_sums_gradients_and_moves_nothing_else(compiled):
    """A ring's sum sends 2 (n - 1) / n of the gradients; the tied table has two, of lookup and head."""
    table = 4 * 64 * 32
    moved = sent(compiled, "data=8:0")
    assert set(moved) == {("all-reduce", "data")}
    expected = 2 * 7 / 8 * (compiled["data=8:0"]["parameters"] + table)
    assert abs(moved["all-reduce", "data"] - expected) < 100  # and a few scalars


def test_what_zero_splits_is_gathered(compiled):
    """At level 1 new parameters, once; at level 3 parameters before their use, which is more often."""
    once = 7 / 8 * compiled["data=8:1"]["parameters"]
    first, third = (sent(compiled, case)["all-gather", "data"] for case in ("data=8:1", "data=8:3"))
    assert once <= first < 1.2 * once
    assert 1.5 * once < third <= 2 * once
    held = [compiled[f"data=8:{level}"]["arguments"] for level in (0, 1, 3)]
    assert held[0] > 2 * held[1] > 4 * held[2]


def test_tensor_gathers_and_scatters_the_stream(compiled):
    moved = sent(compiled, "tensor=8:0")
    assert {kind for kind, *_ in moved} == {"reduce-scatter", "all-gather", "all-reduce"}
    assert {axis for _, *axes in moved for axis in axes} == {"tensor"}


def test_context_sends_keys_round_the_ring(compiled):
    moved = sent(compiled, "context=8:0")
    assert moved["collective-permute", "context"] > moved["all-reduce", "context"]
    assert moved["all-gather", "context"] < 1000  # of a few numbers for each token
