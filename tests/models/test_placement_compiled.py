"""A placed train step compiled for four TPUs that are not there: the kernels are in it, and what it sends.

libtpu (`pip install libtpu`) is looked for in the environment and in the folder MODICUM_LIBTPU.
"""

import json
import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.tpu_aot

B, T, D, LAYERS = 4, 512, 256, 1
TENSOR, CONTEXT = "contiguous data=2,tensor=2", "zigzag data=2,context=2"
PROGRAM = """
import importlib.util, json, logging, sys
import jax, jax.numpy as jnp, numpy as np, optax
from jax.experimental import topologies
from modicum.models import BF16, MLP, GroupedQuery, RMSNorm, Rotary, Transformer, TransformerConfig
from modicum.models.placement import placed
from modicum.parallel import Layout, MeshShape, make_mesh
from modicum.research.training.objectives import full_tuning, language_modelling
from modicum.research.training.state import create_state
from modicum.research.training.step import make_train_step

if importlib.util.find_spec("libtpu") is None:
    print(json.dumps({"missing": "libtpu is not installed"})); sys.exit()
B, T, D, layers = map(int, sys.argv[1:5])
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
attention = GroupedQuery(4, 2, head_width=64)
model = Transformer(TransformerConfig(layers=layers, width=D, vocab=512, attention=attention,
    positions=Rotary(), mlp=MLP(512), norm=RMSNorm(), precision=BF16))
optimizer = optax.sgd(0.1)
integers, floats = (jax.ShapeDtypeStruct((B, T), kind) for kind in ("int32", "float32"))
batch = dict.fromkeys(("tokens", "targets", "segments", "positions"), integers) | {"weights": floats}
state = jax.eval_shape(
    lambda: create_state(model.init(jax.random.key(0), jnp.zeros((B, T), jnp.int32)), optimizer))
logs = []
handler = logging.Handler()
handler.emit = lambda record: logs.append(record.getMessage())
logging.getLogger("modicum.kernels").addHandler(handler)
logging.getLogger("modicum.kernels").setLevel("INFO")
found = {}
for name in sys.argv[5:]:
    order, mesh = name.split()
    layout = Layout(make_mesh(MeshShape.parse(mesh), devices), order=order)
    step = make_train_step(placed(language_modelling(full_tuning(model)), layout), optimizer)
    shardings, same = layout.state(state, model.axes), layout.replicated()
    given, results = (shardings, same, layout.batch(batch)), (shardings, same)
    lowered = jax.jit(step, in_shardings=given, out_shardings=results).lower(state, {}, batch)
    found[name] = {"text": lowered.compile().as_text(), "logs": list(logs)}
    logs.clear()
print(json.dumps({"missing": None, "programs": found}))
"""


@pytest.fixture(scope="module")
def programs():
    """By order and mesh, the compiled program's text and what the kernels' choice logged."""
    paths = [os.environ.get("MODICUM_LIBTPU"), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "JAX_PLATFORMS": "cpu"}
    environment |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment["XLA_FLAGS"] = ""  # those of conftest.py are for CPUs; libtpu refuses what it does not know
    given = [sys.executable, "-c", PROGRAM, *map(str, (B, T, D, LAYERS)), TENSOR, CONTEXT]
    result = subprocess.run(given, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout.splitlines()[-1])
    if found["missing"]:
        pytest.skip(f"{found['missing']} (or set MODICUM_LIBTPU)")
    return found["programs"]


def kernels(text):
    return re.findall(r"%\w*?(attention_[a-z_]+?)_*\.?\d* = .*tpu_custom_call", text)


def gathered(text):
    """Shapes of what all-gathers give."""
    results = re.findall(r"= (.*?) all-gather(?:-start)?\(", text)
    return {tuple(map(int, shape.split(","))) for shape in re.findall(r"\w+\[([\d,]+)\]", " ".join(results))}


def test_kernels_run_on_rows_and_heads_and_tokens_are_scattered_between(programs):
    text, logs = programs[TENSOR]["text"], programs[TENSOR]["logs"]
    assert kernels(text).count("attention_forward") == LAYERS
    assert any(name.endswith("gradients") for name in kernels(text))
    assert "B=2 T=512 S=512 H=2 G=1 K=64 bfloat16 on tpu" in logs[0]
    assert all(": tpu" in line for line in logs)  # chosen, and nothing else
    # attention and mlp, forward and backward: partial sums are scattered along T, not copied
    assert len(re.findall(r"calls=%all-reduce-scatter|= \S+ reduce-scatter\(", text)) >= 4 * LAYERS
    # only the stream is brought together, one data group's rows of it; no weights
    assert gathered(text) <= {(B // 2, T // 2, D), (B // 2, T, D)}


def test_sequences_over_devices_send_keys_round_and_gather_nothing_but_ids(programs):
    text, logs = programs[CONTEXT]["text"], programs[CONTEXT]["logs"]
    assert "attention_forward" in kernels(text) and "T=128 S=128 H=4" in logs[0]
    assert all(": tpu" in line for line in logs)
    assert re.search(r"= .* collective-permute(-start)?\(", text)
    assert gathered(text) <= {(B // 2, T), (B // 2, T // 2)}
