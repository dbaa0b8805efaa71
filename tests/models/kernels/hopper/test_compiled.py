"""The Hopper kernels compiled to sm_90a by the CUDA plugin, on a machine without a GPU.

In a process of its own: once JAX has seen the plugin it is another JAX. The wheels (`jax-cuda13-plugin`,
`jax-cuda13-pjrt`, `nvidia-cuda-nvcc`, `nvidia-nvvm`) are looked for in the environment and in the folder
MODICUM_CUDA_WHEELS, into which `pip install --target` can put them without touching the environment.
"""

import json
import os
import subprocess
import sys

import pytest

from modicum.experiments.bench.attention_compiled import SHARED_MEMORY_LIMIT, shapes

pytestmark = pytest.mark.gpu_aot

# bytes, stores and loads, of what does not fit beside the accumulators of dk and dv, 128 of 240 registers; of
# the first it is one register a thread. Loads put in order by barriers made no difference
SPILLED = {
    ("causal, ALiBi, K=128", "attention_key_gradient"): 8,
    ("dense bias, dense mask, dropout, K=128", "attention_key_gradient"): 212,
}
PROGRAM = """
import dataclasses, json, sys
from modicum.experiments.bench.attention_compiled import compile_shape, missing, shapes
reason = missing()
names = sys.argv[1:]
kernels = [] if reason else [k for s in shapes() if s.name in names for k in compile_shape(s)]
print(json.dumps({"missing": reason, "kernels": [dataclasses.asdict(k) for k in kernels]}))
"""


def kernels_of(program: str, *arguments: str) -> list[dict]:
    """What a program that is given the wheels prints last: JSON of `missing`, or else of `kernels`."""
    folder = os.environ.get("MODICUM_CUDA_WHEELS")
    paths = [folder, os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout.splitlines()[-1])
    if found["missing"]:
        pytest.skip(f"{found['missing']} (or set MODICUM_CUDA_WHEELS)")
    return found["kernels"]


@pytest.mark.parametrize("width", [64, 128])
def test_kernels_keep_to_registers_and_shared_memory(width):
    names = [shape.name for shape in shapes() if shape.width == width]
    kernels = kernels_of(PROGRAM, *names)
    assert {kernel["shape"] for kernel in kernels} == set(names)
    for kernel in kernels:
        spilled = kernel["spill_stores"] + kernel["spill_loads"]
        assert spilled <= SPILLED.get((kernel["shape"], kernel["kernel"]), 0), kernel
        # three warpgroups' even share of 65536; of one, that two blocks fit a multiprocessor
        most = 255 if kernel["kernel"] == "attention_pages" else 168
        assert 0 < kernel["registers"] <= most, kernel
        assert 0 < kernel["shared_memory"] <= SHARED_MEMORY_LIMIT, kernel
    for name in names:
        parts = [kernel["kernel"] for kernel in kernels if kernel["shape"] == name]
        wanted = {"attention_forward", "attention_query_gradient", "attention_key_gradient"}
        wanted = {"attention_pages"} if name.startswith("decoding") else wanted
        if name.startswith("one backward kernel"):  # its forward kernel is that of a shape before
            wanted = {"attention_fused_gradient"}
        assert set(parts) - {"attention_bias_gradient"} == wanted
        assert ("attention_bias_gradient" in parts) == (
            name.startswith(("causal, dense", "dense bias", "bucketed"))
        )
