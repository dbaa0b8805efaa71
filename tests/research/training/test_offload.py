"""Optimizer state in the host's memory: where it lies, and that no loss changes."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from modicum.models import TransformerConfig, multi_head
from modicum.models.mlp import MLP
from modicum.models.precision import FP32
from modicum.models.transformer import Transformer
from modicum.parallel.layout import Layout
from modicum.parallel.mesh import MeshShape, make_mesh
from modicum.research.training.config import OptimizerConfig, TrainingConfig
from modicum.research.training.loss_scale import NO_SCALING
from modicum.research.training.program import build_program
from modicum.research.training.tasks import language_model_job

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = TrainingConfig(steps=4, batch=8, optimizer=OptimizerConfig(learning_rate=0.01))
MODEL = TransformerConfig(layers=2, width=16, vocab=32, attention=multi_head(2), mlp=MLP(32), precision=FP32)


class Rows:
    """Eight rows of tokens to continue."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        tokens = (np.arange(9) * (index % 8 + 1)) % 32
        return {
            "tokens": tokens[:-1].astype(np.int32),
            "targets": tokens[1:].astype(np.int32),
            "weights": np.ones(8, np.float32),
        }


def run(offload, layout):
    config = replace(CONFIG, offload=offload)
    job = language_model_job(Transformer(MODEL), Rows(), config, layout=layout)
    program = build_program(job, config, layout, NO_SCALING)
    state, losses = program.create(), []
    for step in range(config.steps):
        state, metrics = program.step(state, program.frozen, layout.place(job.batches(step)))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.parametrize("mesh", [MeshShape(), MeshShape(fsdp=2, tensor=2)], ids=str)
def test_offloaded_state_lies_in_the_hosts_memory_and_changes_no_loss(mesh):
    layout = Layout(make_mesh(mesh, jax.devices()[: mesh.size]))
    state, losses = run(True, layout)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.optimizer) if leaf.shape}
    assert kinds == {"pinned_host"}
    assert "pinned_host" not in {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.trainable)}
    _, expected = run(False, layout)
    assert losses == expected and losses[-1] < losses[0]
