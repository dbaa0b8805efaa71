"""Tier 3: forward and backward pass compiled for TPUs that are not there, by libtpu in a process of its own.

libtpu (`pip install libtpu`) is looked for in the environment and in the folder MODICUM_LIBTPU.
"""

import json
import os
import subprocess
import sys

import pytest

from modicum.experiments.bench.attention_tpu import TOPOLOGIES
from modicum.experiments.bench.decode_tpu import CASES

pytestmark = pytest.mark.tpu_aot

PROGRAM = """
import json, sys
from modicum.experiments.bench.attention_tpu import compile_named, missing
from modicum.experiments.bench.decode_tpu import compile_pages
reason = missing()
kind, chip, *names = sys.argv[1:]
build = {"attention": compile_named, "pages": compile_pages}[kind]
kernels = {} if reason else {name: build(name, chip) for name in names}
print(json.dumps({"missing": reason, "kernels": kernels}))
"""


def compiled(chip, *names, kind="attention"):
    paths = [os.environ.get("MODICUM_LIBTPU"), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    environment |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # no chip is touched: others may compile meanwhile
    environment["XLA_FLAGS"] = ""  # those of conftest.py are for CPUs; libtpu refuses what it does not know
    given = [sys.executable, "-c", PROGRAM, kind, chip, *names]
    result = subprocess.run(given, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout.splitlines()[-1])
    if found["missing"]:
        pytest.skip(f"{found['missing']} (or set MODICUM_LIBTPU)")
    return found["kernels"]


@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_forward_and_backward_compile_alone_and_on_four_devices(chip):
    found = compiled(chip, "causal", "packed on 4 devices", "relations")
    for name in ("causal", "packed on 4 devices"):
        assert found[name] == ["attention_all_gradients", "attention_forward"]
    assert "attention_bias_gradient" in found["relations"]


def test_every_kind_of_term_compiles():
    biases = ["dense bias", "bias of keys", "bucketed", "alibi"]  # relations: on every chip, above
    found = compiled("v5e", "mask tree", "sinks, dropout, soft cap", *biases)
    assert len(found) == 6
    for name, calls in found.items():
        has_bias = name in biases
        assert len(calls) == 2 + has_bias and ("attention_bias_gradient" in calls) == has_bias


@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_the_most_that_one_kernel_holds_compiles_and_beyond_there_are_two(chip):
    one, too, two = compiled(chip, "32768 queries", "16384 queries of 2 heads", "40960 queries").values()
    assert one == too == ["attention_all_gradients", "attention_forward"]
    assert two == ["attention_forward", "attention_key_gradients", "attention_query_gradient"]


@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_pages_are_read_where_they_lie(chip):
    for found in compiled(chip, *CASES, kind="pages").values():
        assert found == {"kernels": ["attention_pages"], "copies": []}
