"""Another activation function in a trained decoder: the teacher's loss, and what training makes good."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import (
    MLP,
    ClassifierHead,
    GatedMLP,
    Layer,
    RoutedMLP,
    Transformer,
    TransformerConfig,
    multi_head,
)
from modicum.research.sparsity import measure
from modicum.research.sparsity.hidden_distillation import hidden_distillation, row_vectors, same_neighbour
from modicum.research.sparsity.relufication import (
    Relufication,
    relufication_job,
    relufy,
    self_distillation,
    with_activation,
)
from modicum.research.training.activation_penalty import ActivationPenalty
from modicum.research.training.config import OptimizerConfig, TrainingConfig
from modicum.research.training.objectives import full_tuning

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = TransformerConfig(
    layers=1, width=16, vocab=12, attention=multi_head(2), mlp=MLP(64, "silu"), initial_std=0.4
)
TRAINING = TrainingConfig(steps=60, batch=8, optimizer=OptimizerConfig("adamw", 1e-3))


def rows(count=64, length=8, seed=0):
    draw = np.random.default_rng(seed)
    for _ in range(count):
        tokens = draw.integers(0, 12, length + 1).astype(np.int32)
        weights = (np.arange(length) < length - 2).astype(np.float32)
        yield {"tokens": tokens[:-1], "targets": tokens[1:], "weights": weights}


@pytest.fixture(scope="module")
def dense(quick_compile):
    model = Transformer(CONFIG)
    return model, model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)), list(rows())


def test_the_teachers_loss_is_its_divergence_by_token(dense):
    model, params, given = dense
    changed = with_activation(model, "relu")
    batch = {name: np.stack([row[name] for row in given[:3]]) for name in given[0]}
    loss = self_distillation(model)(full_tuning(changed))
    sums = loss(params, {"teacher": params}, batch, None)
    p, q = (np.asarray(jax.nn.softmax(each.apply(params, batch["tokens"]))) for each in (model, changed))
    apart = (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(sums.total, (apart * batch["weights"]).sum(), rtol=1e-3)
    agreed = (p.argmax(-1) == q.argmax(-1)) * batch["weights"]
    assert float(sums.metrics["agreement"]) == agreed.sum() and float(sums.weight) == batch["weights"].sum()
    itself = self_distillation(model)(full_tuning(model))(params, {"teacher": params}, batch, None)
    assert abs(float(itself.total)) < 1e-5
    frozen = jax.grad(lambda teacher: loss(params, {"teacher": teacher}, batch, None).total)(params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(frozen))


def test_trained_from_itself_the_relu_model_is_near_the_one_it_was(dense):
    model, params, given = dense
    held_out = list(rows(8, seed=1))
    made = relufy(model, params, given, held_out, Relufication(training=TRAINING))
    assert made.model.config.mlp == MLP(64, "relu") and set(made.after) == {"loss", "accuracy"}
    assert made.before["loss"] != made.swapped["loss"] != made.after["loss"]
    tokens = np.stack([row["tokens"] for row in held_out])
    p, *others = (
        jax.nn.log_softmax(each.apply(own, tokens))
        for each, own in ((model, params), (made.model, params), (made.model, made.params))
    )
    untrained, trained = (float((jnp.exp(p) * (p - q)).sum(-1).mean()) for q in others)
    assert trained < 0.6 * untrained
    batch = [{"tokens": tokens}]
    assert measure(model, params, batch).nonzero_ratio > 0.99  # SiLU is never exactly 0
    assert measure(made.model, made.params, batch).nonzero_ratio < 0.7


def test_a_price_is_added_to_either_teachers_loss(dense):
    model, params, given = dense
    losses = []
    for price in (0.0, 1.0):
        wanted = Relufication(training=TRAINING, penalty=ActivationPenalty(((0, price),)))
        job = relufication_job(model, params, given, given, wanted)
        sums = jax.jit(job.loss)(params, job.frozen, dict(job.batches(0)), jax.random.key(0))
        losses.append(float(sums.total))
    size = float(sums.metrics["activation_size"])
    assert size > 0 and losses[1] - losses[0] == pytest.approx(size, rel=1e-3)


def test_text_may_teach(dense):
    model, params, given = dense
    job = relufication_job(model, params, given, given, Relufication(teacher="text", training=TRAINING))
    assert job.frozen == {} and job.evaluate is not None
    batch = dict(job.batches(0))
    found = job.loss(params, {}, batch, None)
    logits = with_activation(model, "relu").apply(params, batch["tokens"])
    loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(found.total, (loss * batch["weights"]).sum(), rtol=1e-4)


def test_every_dense_layer_changes_and_others_are_refused():
    pattern = (Layer(), Layer(mlp=GatedMLP(8, "silu")))
    model = Transformer(replace(CONFIG, layers=2, pattern=pattern))
    changed = with_activation(model, "relu").config
    assert [changed.layer(i)[1].activation for i in (0, 1)] == ["relu", "relu"]
    routed = Transformer(replace(CONFIG, mlp=RoutedMLP(experts=2, chosen=2)))
    with pytest.raises(InputError, match="mlp is a RoutedMLP; an MLP or a GatedMLP can be changed"):
        with_activation(routed, "relu")
    with pytest.raises(InputError, match="this is an encoder with LanguageModelHead"):
        relufication_job(Transformer(replace(CONFIG, kind="encoder")), {}, [], [], Relufication())
    body, taught = Transformer(replace(CONFIG, kind="encoder"), None), Relufication(teacher="text")
    with pytest.raises(InputError, match="no next token that text could teach; teacher 'itself' is valid"):
        relufication_job(body, {}, [], [], taught)
    with pytest.raises(InputError, match="with ClassifierHead"):
        relufication_job(Transformer(CONFIG, ClassifierHead(2)), {}, [], [], Relufication())


def read(seed, count, length=8):
    """Rows of an encoder, the last tokens of which are padding."""
    draw = np.random.default_rng(seed)
    for _ in range(count):
        segments = (np.arange(length) < draw.integers(4, length + 1)).astype(np.int32)
        tokens = draw.integers(0, 12, length).astype(np.int32) * segments
        yield {"tokens": tokens, "segments": segments, "weights": segments.astype(np.float32)}


@pytest.fixture(scope="module")
def encoder(quick_compile):
    model = Transformer(replace(CONFIG, kind="encoder"), None)
    return model, model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))


def test_an_encoders_distance_is_that_of_its_hidden_states(encoder):
    model, params = encoder
    changed, rows = with_activation(model, "relu"), list(read(0, 5))
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    loss = hidden_distillation(model)(full_tuning(changed))
    sums = loss(params, {"teacher": params}, batch, None)
    given = {"segments": batch["segments"]}
    h, g = (np.asarray(each.apply(params, batch["tokens"], **given)) for each in (model, changed))
    real = batch["segments"] > 0
    apart = np.square(g - h).sum(-1) / np.square(h).sum(-1)
    np.testing.assert_allclose(sums.total, apart[real].sum(), rtol=1e-4)
    angle = (g * h).sum(-1) / np.linalg.norm(g, axis=-1) / np.linalg.norm(h, axis=-1)
    np.testing.assert_allclose(sums.metrics["cosine"], angle[real].sum(), rtol=1e-4)
    assert float(sums.weight) == real.sum()
    means = np.stack([states[mask].mean(0) for states, mask in zip(h, real)])
    vectors = row_vectors(model, params, rows)
    np.testing.assert_allclose(vectors, means / np.linalg.norm(means, axis=1, keepdims=True), rtol=1e-4)
    assert same_neighbour(vectors, vectors) == 1.0
    turns = np.radians([[0, 10, 100], [0, 80, 100]])
    one, other = np.stack([np.cos(turns), np.sin(turns)], -1)
    assert same_neighbour(one, other) == pytest.approx(2 / 3) and same_neighbour(one[:1], other[:1]) == 0.0


def test_an_encoder_is_brought_back_to_its_hidden_states(encoder):
    model, params = encoder
    wanted = Relufication(training=TRAINING, penalty=ActivationPenalty(((0, 0.01),)))
    made = relufy(model, params, list(read(1, 64)), list(read(2, 16)), wanted)
    assert made.before == {"distance": 0.0, "cosine": 1.0, "same neighbour": 1.0}
    assert made.after["distance"] < 0.6 * made.swapped["distance"]
    assert made.after["cosine"] > made.swapped["cosine"]
    batch = [{name: np.stack([row[name] for row in read(2, 16)]) for name in ("tokens", "segments")}]
    assert measure(made.model, made.params, batch).nonzero_ratio < 0.7
