"""A checkpoint saved where the layers lie in pipeline stages comes back bit for bit where they do not."""

import jax
import pytest

from modicum.parallel import Layout, MeshShape, make_mesh
from modicum.research.training.checkpoints import Checkpoints
from modicum.research.training.fingerprint import fingerprint
from modicum.research.training.loss_scale import NO_SCALING
from modicum.research.training.program import build_program

pytestmark = pytest.mark.usefixtures("quick_compile")


def not_compiled(*arguments):
    raise AssertionError("no step is taken here")


@pytest.fixture(scope="module")
def program_on(decoder):
    """The training program of the small decoder on a mesh, its step not compiled."""

    def build(mesh):
        shape = MeshShape.parse(mesh)
        layout = Layout(make_mesh(shape, jax.devices()[: shape.size]), zero=1, minimum=0)
        job, config = decoder.job_of(layout, "fp32", "dense", dropout=0.0)
        return build_program(job, config, layout, NO_SCALING, step=not_compiled)

    return build


def kernel_rows(state):
    """How many layers' kernels the first device holds."""
    kernel = state.trainable["layers"]["mlp"]["up"]["kernel"]
    return kernel.addressable_shards[0].data.shape[0]


@pytest.mark.parametrize("other", ["fsdp=2", "data=1"])
def test_a_checkpoint_crosses_to_a_mesh_without_stages_and_back(program_on, other, tmp_path):
    staged, plain = program_on("pipe=2,fsdp=2"), program_on(other)
    state = staged.create()
    assert kernel_rows(state) == 1
    with Checkpoints(tmp_path / "staged") as checkpoints:
        checkpoints.save(1, state)
        there = checkpoints.restore(plain.abstract)
    assert there is not None and kernel_rows(there.state) == 2
    assert fingerprint(there.state) == fingerprint(state)
    with Checkpoints(tmp_path / "plain") as checkpoints:
        checkpoints.save(2, there.state)
        back = checkpoints.restore(staged.abstract)
    assert back is not None and fingerprint(back.state) == fingerprint(state)
    lies = [jax.tree.map(lambda leaf: leaf.sharding, each) for each in (back.state, state)]
    assert lies[0] == lies[1]
