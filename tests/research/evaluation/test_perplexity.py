"""Strided perplexity against a plain loop over windows, and on what a loop must agree with."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import MLP, GroupedQuery, Learned, Transformer, TransformerConfig
from modicum.parallel import Layout, MeshShape, make_mesh
from modicum.research.evaluation import strided_perplexity
from modicum.research.evaluation.perplexity import _row_nats, windows

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = TransformerConfig(
    layers=2, width=16, vocab=53, attention=GroupedQuery(2), mlp=MLP(32), positions=Learned(24)
)
TEXT = np.random.default_rng(0).integers(0, 53, 101)


@pytest.fixture(scope="module")
def model():
    model = Transformer(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 4), jnp.int32))
    return model, jax.tree.map(lambda x: x * (8 if x.ndim > 1 else 1), params)


@functools.cache
def jitted(model):
    return jax.jit(model.apply)


def loop(model, params, text, window, stride):
    """Window after window, one at a time, in float64: nats and the number of scored tokens."""
    nats, count, previous, forward = 0.0, 0, 0, jitted(model)
    for begin in range(0, len(text), stride):
        end = min(begin + window, len(text))
        new = end - previous
        ids = text[begin:end]
        padded = np.zeros((1, 24), np.int32)
        padded[0, : len(ids)] = ids
        logits = np.asarray(forward(params, padded), np.float64)[0, : len(ids)]
        labels = np.where(np.arange(len(ids)) < len(ids) - new, -100, ids)
        for at in range(1, len(ids)):
            if labels[at] != -100:
                row = logits[at - 1]
                nats += np.log(np.exp(row - row.max()).sum()) + row.max() - row[labels[at]]
                count += 1
        previous = end
        if end == len(text):
            break
    return nats, count


@pytest.mark.parametrize("window, stride", [(24, 8), (24, 24), (10, 1), (7, 5), (2, 1)])
def test_it_is_the_loop_over_windows(model, window, stride):
    got = strided_perplexity(*model, TEXT, window=window, stride=stride, rows=5)
    nats, count = loop(*model, TEXT, window, stride)
    assert got.scored == count
    assert got.scored == 100 or stride == window
    np.testing.assert_allclose(got.nats, nats, rtol=2e-6)
    np.testing.assert_allclose(got.perplexity, math.exp(nats / count), rtol=1e-5)
    np.testing.assert_allclose(got.bits_per_token, nats / count / math.log(2), rtol=1e-5)
    np.testing.assert_allclose(got.bits_per_byte(300), nats / math.log(2) / 300, rtol=1e-5)


def test_a_short_text_is_one_window(model):
    got = strided_perplexity(*model, TEXT[:9], window=24)
    assert (got.windows, got.scored) == (1, 8)
    np.testing.assert_allclose(got.nats, loop(*model, TEXT[:9], 24, 12)[0], rtol=2e-6)


def test_batches_texts_and_meshes_change_nothing(model):
    _row_nats.clear_cache()
    one = strided_perplexity(*model, TEXT, window=12, stride=4, rows=4)
    assert strided_perplexity(*model, TEXT[:50], window=12, stride=7, rows=4).scored == 49
    assert _row_nats._cache_size() == 1, "one program whatever the text and stride"
    many = strided_perplexity(*model, TEXT, window=12, stride=4, rows=64)
    np.testing.assert_allclose(many.nats, one.nats, rtol=1e-6)
    layout = Layout(make_mesh(MeshShape(data=2, tensor=2), jax.devices()[:4]), replicate=("embedding/table",))
    params = jax.device_put(model[1], layout.parameters(model[1], model[0].axes))
    spread = strided_perplexity(model[0], params, TEXT, window=12, stride=4, rows=5, layout=layout)
    np.testing.assert_allclose(spread.nats, one.nats, rtol=1e-5)


@pytest.mark.parametrize("length, window, stride", [(1, 4, 2), (4, 4, 4), (17, 5, 3), (40, 8, 1), (9, 4, 4)])
def test_windows_score_each_token_once(length, window, stride):
    scored = [at for place in windows(length, window, stride) for at in range(place.scored, place.stop)]
    left = set(range(0, length, stride)) if stride == window else {0}
    assert scored == [at for at in range(length) if at not in left]
    for place in windows(length, window, stride):
        assert place.stop - place.start <= window and place.scored > place.start


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"window": 25}, "24 positions"),
        ({"window": 8, "stride": 9}, "stride=9"),
        ({"window": 1}, "window=1"),
        ({"window": 8, "rows": 0}, "rows=0"),
    ],
)
def test_impossible_windows_are_refused(model, options, problem):
    with pytest.raises(InputError, match=problem):
        strided_perplexity(*model, TEXT, **options)


def test_impossible_texts_are_refused(model):
    with pytest.raises(InputError, match="53 ids"):
        strided_perplexity(*model, [1, 53], window=8)
    with pytest.raises(InputError, match="at least 2"):
        strided_perplexity(*model, [1], window=8)
