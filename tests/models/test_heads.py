"""Logits over words and labels: ties, padded vocabularies, pooling."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import (
    FP64,
    MLP,
    ClassifierHead,
    LanguageModelHead,
    Transformer,
    TransformerConfig,
    multi_head,
)
from modicum.models.heads import pool
from modicum.models.losses import weighted_cross_entropy
from modicum.models.residuals import PostNorm, PreNorm
from modicum.models.word_scores import MASKED_LOGIT

pytestmark = pytest.mark.usefixtures("quick_compile")

TOKENS = np.asarray([[3, 1, 4, 1], [5, 2, 6, 0]])
SEGMENTS = np.asarray([[1, 1, 1, 1], [1, 1, 0, 0]])
CONFIG = TransformerConfig(layers=1, width=8, vocab=7, attention=multi_head(2), mlp=MLP(8), precision=FP64)


def hidden_states(config, params, **kwargs):
    own = {name: tree for name, tree in params.items() if name not in ("head", "classifier")}
    return np.asarray(jax.jit(Transformer(config, None).apply)(own, TOKENS, **kwargs))


@pytest.mark.parametrize("tied", [True, False])
def test_words_are_scored_by_the_table_or_by_a_kernel(tied, random_parameters, x64):
    config = replace(CONFIG, tied=tied, logit_scale=0.25)
    params = random_parameters(Transformer(config), TOKENS)
    assert ("head" in params) != tied
    kernel = params["embedding"]["table"].T if tied else params["head"]["kernel"]
    logits = jax.jit(Transformer(config).apply)(params, TOKENS)
    expected = hidden_states(config, params) @ kernel / 4
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tied, smoothing", [(True, 0.1), (False, 0.0)])
def test_padded_words_have_no_probability_and_no_say(tied, smoothing, random_parameters, x64):
    config = replace(CONFIG, tied=tied, vocab_multiple=8)
    params = random_parameters(Transformer(config), TOKENS)
    assert params["embedding"]["table"].shape == (8, 8)

    def loss(params, config):
        logits = Transformer(config).apply(params, TOKENS)
        total, weight = weighted_cross_entropy(logits, TOKENS, jnp.ones(TOKENS.shape), smoothing)
        return total / weight, logits

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (value, logits), gradient = run(params, config)
    assert (logits[..., 7] == MASKED_LOGIT).all()
    assert (jax.nn.softmax(logits)[..., 7] == 0).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert not np.asarray(gradient["embedding"]["table"])[7].any()
    narrow = {**params, "embedding": {"table": params["embedding"]["table"][:7]}}
    if not tied:
        narrow["head"] = {"kernel": params["head"]["kernel"][:, :7]}
    (expected, _), _ = run(narrow, replace(config, vocab_multiple=1))
    np.testing.assert_allclose(value, expected, rtol=1e-13)


def test_classifier_is_linear_in_the_pooled_state(random_parameters, x64):
    poolings = ("last", "first", "mean")
    params = random_parameters(Transformer(CONFIG, ClassifierHead(3)), TOKENS)

    @jax.jit
    def run(params):
        heads = [None, *(ClassifierHead(3, pooling) for pooling in poolings)]
        return [Transformer(CONFIG, head).apply(params, TOKENS, segments=SEGMENTS) for head in heads]

    hidden, *logits = map(np.asarray, run(params))
    last = {0: 3, 1: 1}  # the last token of each row that is not padding
    pooled = {
        "last": np.stack([hidden[row, place] for row, place in last.items()]),
        "first": hidden[:, 0],
        "mean": np.stack([hidden[row, : place + 1].mean(0) for row, place in last.items()]),
    }
    for pooling, scores in zip(poolings, logits):
        expected = pooled[pooling] @ params["classifier"]["kernel"] + params["classifier"]["bias"]
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind, pooling", [("decoder", "last"), ("encoder", "first")])
def test_a_narrow_classifier_computes_the_same_with_less(kind, pooling, random_parameters, x64):
    """Padding in front, so that neither the first nor the last token is at the edge of every row."""
    residual = PostNorm() if kind == "encoder" else PreNorm()
    config = replace(CONFIG, kind=kind, layers=2, residual=residual, mlp=MLP(64))
    segments = np.asarray([[0, 1, 1, 1], [0, 0, 1, 0]])
    params = random_parameters(Transformer(config, ClassifierHead(3)), TOKENS)

    def run(narrow):
        model = Transformer(config, ClassifierHead(3, pooling, narrow=narrow))

        def loss(params):
            return jnp.sin(model.apply(params, TOKENS, segments=segments)).sum()

        compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        return compiled(params), compiled.cost_analysis()["flops"]

    (wide, all_of_it), (narrow, less) = run(False), run(True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), wide, narrow)
    assert less < 0.75 * all_of_it


@pytest.mark.parametrize(
    "change, message", [({"scan": True}, "not scanned layers"), ({"kind": "encoder-decoder"}, "not an enc")]
)
def test_a_narrow_classifier_needs_a_last_layer_of_its_own(change, message, x64):
    model = Transformer(replace(CONFIG, **change), ClassifierHead(3, narrow=True))
    more = {"decoder_tokens": TOKENS} if "kind" in change else {}
    with pytest.raises(InputError, match=message):
        jax.eval_shape(lambda: model.init(jax.random.key(0), TOKENS, **more))


def test_pooling_without_segments_takes_every_token_and_with_padding_on_the_left_skips_it():
    hidden = jnp.arange(8.0).reshape(1, 8, 1)
    left = jnp.asarray([[0, 0, 0, 1, 1, 1, 0, 0]])
    assert [float(pool(hidden, None, how)[0, 0]) for how in ("last", "first", "mean")] == [7, 0, 3.5]
    assert [float(pool(hidden, left, how)[0, 0]) for how in ("last", "first", "mean")] == [5, 3, 4]


def test_a_row_of_padding_alone_pools_to_something_finite():
    hidden, nothing = jnp.ones((1, 4, 2)), jnp.zeros((1, 4), int)
    for how in ("last", "first", "mean"):
        assert jnp.isfinite(pool(hidden, nothing, how)).all()


def test_the_mean_of_many_half_precision_states_is_taken_in_float32():
    hidden = jnp.ones((1, 1001, 1), jnp.bfloat16)
    assert float(pool(hidden, None, "mean")[0, 0]) == 1.0
    assert pool(hidden, None, "mean").dtype == jnp.bfloat16


def test_an_encoder_decoder_classifies_the_decoders_states(random_parameters, x64):
    config = replace(CONFIG, kind="encoder-decoder")
    model = Transformer(config, ClassifierHead(3))
    params = random_parameters(model, TOKENS, decoder_tokens=TOKENS[:, :2])
    assert jax.jit(model.apply)(params, TOKENS, decoder_tokens=TOKENS[:, :2]).shape == (2, 3)


@pytest.mark.parametrize(
    "choice, message",
    [
        ({"labels": 0}, "at least 1 label, not 0"),
        ({"labels": 2, "pooling": "max"}, "pooling='max'"),
        ({"labels": 2, "pooling": "mean", "narrow": True}, "narrow"),
    ],
)
def test_impossible_classifiers_are_errors(choice, message):
    with pytest.raises(InputError, match=message):
        ClassifierHead(**choice)


def test_heads_are_values():
    assert Transformer(CONFIG, ClassifierHead(3)) == Transformer(CONFIG, ClassifierHead(3))
    assert Transformer(CONFIG, LanguageModelHead()) == Transformer(CONFIG)
    assert Transformer(CONFIG, None) != Transformer(CONFIG)
    assert hash(Transformer(CONFIG)) == hash(Transformer(replace(CONFIG)))
