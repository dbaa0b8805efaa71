"""Tier 3: forward and backward pass compiled for TPUs that are not there, by libtpu in a process of its own.

libtpu (`pip install libtpu`) is looked for in the environment and in the folder MODICUM_LIBTPU.
"""

import json
import os
import subprocess
import sys

import pytest

from modicum.experiments.bench.attention_tpu import TOPOLOGIES

pytestmark = pytest.mark.tpu_aot

PROGRAM = """
import json, sys
from modicum.experiments.bench.attention_tpu import compile_named, missing
reason = missing()
chip, *names = sys.argv[1:]
kernels = {} if reason else {name: compile_named(name, chip) for name in names}
print(json.dumps({"missing": reason, "kernels": kernels}))
"""


def compiled(chip, *names):
    paths = [os.environ.get("MODICUM_LIBTPU"), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    given = [sys.executable, "-c", PROGRAM, chip, *names]
    result = subprocess.run(given, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout.splitlines()[-1])
    if found["missing"]:
        pytest.skip(f"{found['missing']} (or set MODICUM_LIBTPU)")
    return found["kernels"]


@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_forward_and_backward_compile_alone_and_on_four_devices(chip):
    found = compiled(chip, "causal", "packed on 4 devices")
    assert set(found) == {"causal", "packed on 4 devices"}
    for calls in found.values():
        assert calls == ["attention_forward", "attention_key_gradients", "attention_query_gradient"]


def test_every_kind_of_term_compiles():
    names = ["mask tree", "dense bias", "bias of keys", "bucketed", "alibi", "sinks, dropout, soft cap"]
    found = compiled("v5e", *names)
    assert set(found) == set(names)
    for name, calls in found.items():
        has_bias = "bias" in name or name in ("bucketed", "alibi")
        assert len(calls) == 3 + has_bias and ("attention_bias_gradient" in calls) == has_bias
