"""Deltas on meshes: the real tuning job trains to the same numbers wherever its arrays lie.

Double precision separates bugs from rounding. Dropout is on, in the model and in LoRA, so that randomness is
shown independent of the mesh as well.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from modicum.models import MLP, ClassifierHead, GroupedQuery, Transformer, TransformerConfig
from modicum.models.positions import Learned
from modicum.models.precision import FP64
from modicum.parallel import Layout, MeshShape, axis_names, bytes_per_device, make_mesh
from modicum.research.delta import (
    IA3,
    Adapter,
    BitFit,
    DoRA,
    Full,
    LoRA,
    attach,
    byte_count,
    delta_axes,
    parameter_count,
)
from modicum.research.training.checkpoints import Checkpoints
from modicum.research.training.config import OptimizerConfig, TrainingConfig
from modicum.research.training.loss_scale import NO_SCALING
from modicum.research.training.program import build_program
from modicum.research.training.tasks import tuning_job

T, V, STEPS = 8, 512, 4
CONFIG = TrainingConfig(
    steps=STEPS, batch=16, precision="fp64", optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
)
SPECS = {
    "lora": {"attention/(query|value)": LoRA(4, dropout=0.1), "classifier": Full()},
    "dora and adapter": {"attention/output": DoRA(4), "mlp/down": Adapter(4), "classifier": Full()},
}
MESHES = {"fsdp=8": 3, "tensor=2": 0, "data=2,fsdp=2,tensor=2": 3}


@pytest.fixture(scope="module", autouse=True)
def in_double_precision(quick_compile):
    with jax.enable_x64(True):
        yield


class Examples:
    """Rows with a rule to learn: the label is the first token's remainder."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(1, V, (48, T), dtype=np.int32)
        self.lengths = rng.integers(3, T + 1, 48)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        segments = (np.arange(T) < self.lengths[index]).astype(np.int32)
        label = np.int32(self.tokens[index, 0] % 4)
        return {
            "tokens": self.tokens[index],
            "segments": segments,
            "label": label,
            "weight": np.float32(1),
        }


@pytest.fixture(scope="module")
def backbone(in_double_precision):
    config = TransformerConfig(
        layers=2,
        width=32,
        vocab=V,
        attention=GroupedQuery(4),
        mlp=MLP(64),
        positions=Learned(T),
        dropout=0.1,
        scan=True,
        precision=FP64,
    )
    model = Transformer(config=config, head=ClassifierHead(4))
    tokens = jnp.zeros((1, T), jnp.int32)
    return model, jax.jit(model.init)(jax.random.key(0), tokens, segments=jnp.ones_like(tokens))


def layout_of(mesh):
    if mesh == "alone":
        return Layout.single()
    count = math.prod(int(part.split("=")[1]) for part in mesh.split(","))
    shape = MeshShape.parse(mesh)
    return Layout(make_mesh(shape, jax.local_devices()[:count]), zero=MESHES[mesh], minimum=64)


@pytest.fixture(scope="module")
def trained(backbone):
    """The training by specification and mesh, made once: program, states, losses."""
    model, params = backbone

    @functools.cache
    def train(spec, mesh):
        layout = layout_of(mesh)
        tuned = attach(model, SPECS[spec])
        job = tuning_job(model, params, tuned, Examples(), CONFIG, layout=layout)
        program = build_program(job, CONFIG, layout, NO_SCALING)
        state, losses = program.create(), []
        initial = jax.device_get(state.trainable)
        for step in range(STEPS):
            state, metrics = program.step(state, program.frozen, layout.place(job.batches(step)))
            losses.append(float(metrics["loss"]))
        return program, layout, initial, state, losses

    return train


@pytest.mark.parametrize(
    ("spec", "mesh"), [*(("lora", mesh) for mesh in MESHES), ("dora and adapter", "data=2,fsdp=2,tensor=2")]
)
def test_the_mesh_does_not_change_the_numbers(trained, spec, mesh):
    _, _, start, expected, losses = trained(spec, "alone")
    _, _, initial, state, found = trained(spec, mesh)
    # DoRA's magnitudes are sums over an axis that the mesh splits; what is drawn is the same to the bit.
    last_bit = 0 if spec == "lora" else 1e-15
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=last_bit, atol=0), initial, start)
    assert losses[-1] < losses[0] - 0.02  # it learns
    np.testing.assert_allclose(found, losses, rtol=0, atol=1e-10)
    for part in ("trainable", "optimizer"):
        pair = jax.device_get((getattr(state, part), getattr(expected, part)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), *pair)


@pytest.mark.parametrize("mesh", ["alone", *MESHES])
def test_the_state_holds_nothing_of_the_backbone(trained, mesh):
    """By bytes: the state is three copies of the delta, on each device what the shardings predict."""
    program, _, _, state, _ = trained("lora", mesh)
    delta = byte_count(state.trainable)
    assert parameter_count(state.trainable) == 2 * 2 * 4 * (32 + 32) + 4 * 32 + 4
    counters = 64
    assert 3 * delta <= byte_count(state) <= 3 * delta + counters
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract)
    predicted = bytes_per_device(program.abstract, shardings)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert held == predicted
    if mesh == "fsdp=8":
        assert predicted < 3 * delta / 8 + 2 * 4 * 8 * 3 + counters  # all but the classifier's bias is split
    memory = program.step.memory_analysis()
    frozen = bytes_per_device(program.frozen, jax.tree.map(lambda leaf: leaf.sharding, program.frozen))
    batch = 16 * (2 * T * 4 + 2 * 4)
    taken = memory.argument_size_in_bytes
    assert predicted + frozen - counters <= taken <= predicted + frozen + batch
    # Out come the state, whose buffers are reused, and scalars: no gradient of the backbone is kept.
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1024


def test_no_gradient_of_the_backbone_is_made(trained, backbone):
    """Against full tuning of the same model: temporaries fall by the gradients, by XLA's account."""
    model, params = backbone
    layout = Layout.single()
    job = tuning_job(model, params, None, Examples(), CONFIG, layout=layout)
    full = build_program(job, CONFIG, layout, NO_SCALING).step.memory_analysis()
    lora = trained("lora", "alone")[0].step.memory_analysis()
    size = byte_count(params)
    assert full.alias_size_in_bytes >= 3 * size and lora.alias_size_in_bytes < 0.2 * size
    print("temporaries", full.temp_size_in_bytes, lora.temp_size_in_bytes, "backbone", size)
    assert full.temp_size_in_bytes - lora.temp_size_in_bytes > 0.5 * size


@pytest.mark.parametrize(("source", "target"), [("fsdp=8", "alone"), ("tensor=2", "data=2,fsdp=2,tensor=2")])
def test_a_checkpoint_crosses_meshes_bit_by_bit(trained, backbone, tmp_path, source, target):
    _, params = backbone
    _, _, _, state, _ = trained("lora", source)
    program, layout, *_ = trained("lora", target)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(STEPS, state, wait=True)
        restored = checkpoints.restore(program.abstract).state
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(program.abstract)):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    stored = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert stored < byte_count(params) / 2
    rows = Examples()
    batch = {key: np.stack([rows[i][key] for i in range(16)]) for key in rows[0]}
    _, metrics = program.step(restored, program.frozen, layout.place(batch))
    assert np.isfinite(metrics["loss"])


def test_arrays_of_a_delta_inherit_their_sites_axes(backbone):
    model, params = backbone
    spec = {
        "attention/query": [LoRA(4), IA3()],
        "attention/output": DoRA(4),
        "mlp/down": [Adapter(4), IA3(on="input")],
        "mlp/up": BitFit(),
        "attention": Adapter(4),
    }
    tuned = attach(model, spec)
    tokens = jnp.zeros((1, T), jnp.int32)
    variables = jax.eval_shape(tuned.init, jax.random.key(0), params, tokens, segments=tokens)
    names = axis_names(variables["delta"], delta_axes(tuned, model.axes))["layers"]
    attention, mlp = names["attention"], names["mlp"]
    layers = "layers"
    assert attention["query"]["~lora"] == {"a": (layers, "width", None), "b": (layers, None, "heads")}
    assert attention["query"]["~ia3"] == {"scale": (layers, "heads")}
    assert attention["output"]["~dora"]["a"] == (layers, "heads", None)
    assert attention["output"]["~dora"]["magnitude"] == (layers, "width")
    assert mlp["down"]["~adapter"]["down_kernel"] == (layers, "width", None)
    assert mlp["down"]["~ia3_1"] == {"scale": (layers, "mlp")}
    assert mlp["up"]["bias"]["~bitfit"] == {"offset": (layers, "mlp")}
    # A module without a kernel has no axes to inherit: copied.
    assert set(attention["~adapter_1"]["down_kernel"]) == {None}
    assert delta_axes(tuned, None) is None


def test_tensor_parallelism_splits_what_the_kernel_splits(trained):
    _, _, _, state, _ = trained("lora", "tensor=2")
    query = state.trainable["layers"]["attention"]["query"]["~lora"]
    assert query["b"].sharding.spec == PartitionSpec(None, None, "tensor")
    assert query["a"].sharding.spec == PartitionSpec()
