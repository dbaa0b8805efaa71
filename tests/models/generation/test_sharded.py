"""Generation on a mesh of simulated devices gives the tokens of one device."""

import jax
import numpy as np
import pytest

from modicum import InputError
from modicum.models.generation import Sampling, beam_search, generate, stream
from modicum.models.generation.job import Job
from modicum.models.generation.steps import decode, prefill
from modicum.models.kernels import Prefix
from modicum.parallel import Layout, MeshShape, make_mesh

pytestmark = pytest.mark.usefixtures("quick_compile")

PROMPTS = [[5, 9, 2], [44, 3, 17, 20, 8], [61]]
AXES = [{"data": 2, "tensor": 2}, {"fsdp": 2, "data": 2}, {"tensor": 4}]


def spread(small, zero=0, **axes):
    """The parameters on a mesh, and its layout."""
    model, params = small
    shape = MeshShape(**axes)
    layout = Layout(make_mesh(shape, jax.devices()[: shape.size]), zero=zero, minimum=256)
    return layout, jax.device_put(params, layout.parameters(params, model.axes))


@pytest.fixture(scope="module")
def expected(small):
    """What one device generates."""
    return generate(*small, PROMPTS, max_new_tokens=12, stop_tokens=[7, 30])


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_the_mesh_does_not_change_the_tokens(small, expected, axes):
    """Three rows over two or four ways of data are filled up; two key/value heads over four are copied."""
    layout, params = spread(small, zero=3 if "fsdp" in axes else 0, **axes)
    got = generate(small[0], params, PROMPTS, max_new_tokens=12, stop_tokens=[7, 30], layout=layout)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    assert got.reasons == expected.reasons


def test_cache_and_rows_lie_on_the_mesh(small):
    layout, params = spread(small, data=2, tensor=2)
    job = Job(small[0], params, PROMPTS, 12, layout=layout)
    job.advance(3)
    cache = job.state.memory.cache
    keys = cache.entries["layers_0"]["attention"]["entries"].keys
    assert keys.shape[:2] == (4, 2) and keys.sharding.shard_shape(keys.shape)[:2] == (2, 1)
    assert job.state.reasons.sharding.shard_shape((4,)) == (2,)
    assert job.outcome()[0].shape[0] == 3


def test_parameters_on_a_mesh_need_no_layout(small, expected):
    _, params = spread(small, tensor=2)
    got = generate(small[0], params, PROMPTS, max_new_tokens=12, stop_tokens=[7, 30])
    np.testing.assert_array_equal(got.tokens, expected.tokens)


def test_sampled_streams_masks_and_beams_too(small):
    layout, params = spread(small, data=2, tensor=2)
    options = {"sampling": Sampling(1.2, top_p=0.9), "rng": jax.random.key(0), "max_new_tokens": 6}
    whole = generate(*small, PROMPTS, **options)
    steps = list(stream(small[0], params, PROMPTS, layout=layout, **options))
    np.testing.assert_array_equal(np.stack(steps, 1), whole.tokens)

    masked = {"inputs": {"mask": Prefix(np.asarray([16, 14, 16], np.int32))}, "max_new_tokens": 6}
    one = generate(*small, PROMPTS, **masked)
    got = generate(small[0], params, PROMPTS, layout=layout, **masked)
    np.testing.assert_array_equal(got.tokens, one.tokens)

    beams = {"max_new_tokens": 6, "beams": 3, "returned": 2, "stop_tokens": 7}
    one, got = (
        beam_search(*small, PROMPTS, **beams),
        beam_search(small[0], params, PROMPTS, layout=layout, **beams),
    )
    np.testing.assert_array_equal(got.tokens, one.tokens)
    np.testing.assert_allclose(got.scores, one.scores, rtol=1e-5)


def test_a_split_length_is_refused(small):
    layout, params = spread(small, context=2)
    with pytest.raises(InputError, match="context=2"):
        generate(small[0], params, PROMPTS, max_new_tokens=2, layout=layout)


def test_programs_on_a_mesh_are_compiled_once(small, caplog):
    """What a step returns lies where it was: the next one is the same program."""
    layout, params = spread(small, data=2, tensor=2)

    def compiled(temperature, new):
        caplog.clear()
        options = {"sampling": Sampling(temperature), "rng": jax.random.key(0), "max_new_tokens": new}
        with jax.log_compiles(True):
            list(stream(small[0], params, PROMPTS, layout=layout, **options))
            generate(small[0], params, PROMPTS, layout=layout, **options)
        messages = [record.getMessage() for record in caplog.records]
        return [text for text in messages if "Compiling" in text and ("prefill" in text or "decode" in text)]

    prefill.clear_cache()
    decode.clear_cache()
    assert len(compiled(1.0, 6)) == 2
    assert compiled(0.5, 9) == []
