"""Log-likelihoods of continuations against reading each text alone; batches and buckets change nothing."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import MLP, GroupedQuery, Learned, Transformer, TransformerConfig
from modicum.parallel import Layout, MeshShape, make_mesh
from modicum.research.evaluation import score_continuations
from modicum.research.evaluation.scoring import _score

pytestmark = pytest.mark.usefixtures("quick_compile")

LIMIT = 32
CONFIG = TransformerConfig(
    layers=2, width=16, vocab=53, attention=GroupedQuery(2), mlp=MLP(32), positions=Learned(LIMIT)
)
LENGTHS = [(1, 1), (5, 3), (20, 12), (33, 1), (60, 32), (2, 31), (9, 9), (7, 1)]


@pytest.fixture(scope="module")
def model():
    model = Transformer(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 4), jnp.int32))
    return model, jax.tree.map(lambda x: x * (8 if x.ndim > 1 else 1), params)


@pytest.fixture(scope="module")
def logs(model):
    """A function from ids to the log-probabilities of what follows each."""
    forward = jax.jit(model[0].apply)

    def of(ids):
        padded = np.zeros((1, LIMIT), np.int32)
        padded[0, : len(ids)] = ids
        logits = np.asarray(forward(model[1], padded), np.float64)[0, : len(ids)]
        top = logits.max(-1, keepdims=True)
        return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))

    return of


@pytest.fixture(scope="module")
def pairs(logs):
    """Random contexts and continuations, and one that the model would have written itself."""
    rng = np.random.default_rng(0)
    made = [(rng.integers(0, 53, a).tolist(), rng.integers(0, 53, b).tolist()) for a, b in LENGTHS]
    text = [3, 4]
    for _ in range(5):
        text.append(int(logs(text)[-1].argmax()))
    return [*made, (text[:2], text[2:])]


def test_scores_are_those_of_each_text_alone(model, pairs, logs):
    got = score_continuations(*model, pairs, limit=LIMIT, rows=3)
    for (context, continuation), score in zip(pairs, got):
        text = [*context, *continuation][-(LIMIT + 1) :]
        rows = logs(text[:-1])[-len(continuation) :]
        expected = sum(row[token] for row, token in zip(rows, continuation))
        np.testing.assert_allclose(score.log_likelihood, expected, rtol=1e-5)
        assert score.greedy == (rows.argmax(-1).tolist() == continuation)
    assert got[-1].greedy and not all(score.greedy for score in got)


def test_order_batches_and_meshes_change_nothing(model, pairs):
    one = score_continuations(*model, pairs, limit=LIMIT, rows=4)
    turned = score_continuations(*model, pairs[::-1], limit=LIMIT, rows=4)[::-1]
    layout = Layout(make_mesh(MeshShape(data=2), jax.devices()[:2]))
    params = jax.device_put(model[1], layout.parameters(model[1], model[0].axes))
    spread = score_continuations(model[0], params, pairs, limit=LIMIT, rows=3, layout=layout)
    for other in (turned, spread):
        np.testing.assert_allclose(
            [score.log_likelihood for score in other], [score.log_likelihood for score in one], rtol=1e-5
        )


def test_programs_are_compiled_per_bucket(model):
    _score.clear_cache()
    for count in (1, 5, 9):
        score_continuations(*model, [([1] * n, [2]) for n in range(1, 1 + count)], limit=LIMIT, rows=4)
    assert _score._cache_size() == 1
    score_continuations(*model, [([1] * n, [2]) for n in range(1, 40)], limit=LIMIT, rows=4)
    assert _score._cache_size() == 3  # 16, 24 and 32 columns


@pytest.mark.parametrize(
    "pair, problem",
    [
        (([], [1]), "no tokens"),
        (([1], []), "no tokens"),
        (([1], [53]), "tokens lie in 1 to 53; the model has 53 ids"),
        (([-1], [5]), "tokens lie in -1 to 5"),
    ],
)
def test_what_is_no_text_cannot_be_scored(model, pair, problem):
    with pytest.raises(InputError, match=problem):
        score_continuations(*model, [pair], limit=LIMIT)


def test_models_and_limits_that_cannot_score_are_refused(model):
    with pytest.raises(InputError, match="'encoder'; continuations are scored by a decoder"):
        score_continuations(Transformer(replace(CONFIG, kind="encoder")), model[1], [([1], [2])], limit=8)
    with pytest.raises(InputError, match="length 33 exceeds the model's 32 positions"):
        score_continuations(*model, [([1], [2])], limit=33)


def test_a_continuation_longer_than_the_model_is_refused(model):
    with pytest.raises(InputError, match="33 tokens; at most 32"):
        score_continuations(*model, [([1], [2] * 33)], limit=LIMIT)
    assert score_continuations(*model, [], limit=LIMIT) == []
