"""Trials: one compiled step for every rate and seed, with the numbers of an ordinary training."""

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

from modicum import InputError
from modicum.models import ClassifierHead, Transformer, TransformerConfig
from modicum.models.attention import GroupedQuery
from modicum.research.data.batches import Batches
from modicum.research.data.examples import Examples
from modicum.research.delta import Full, LoRA, attach
from modicum.research.training.config import OptimizerConfig, TrainingConfig
from modicum.research.training.objectives import classification, delta_tuning, full_tuning
from modicum.research.training.optimizers import make_optimizer
from modicum.research.training.rates import set_rate
from modicum.research.training.state import create_state
from modicum.research.training.step import make_train_step
from modicum.research.training.trials import Trials

CONFIG = TransformerConfig(
    kind="encoder", layers=2, width=16, vocab=40, attention=GroupedQuery(2), initial_std=0.1
)
MODEL = Transformer(CONFIG, ClassifierHead(3, "mean"))
SPECS = {"full": None, "lora": {"attention/query": LoRA(2), "classifier": Full()}}
# Epsilon: a key's bias has no gradient but rounding, which Adam would blow up to steps of any size.
TRAINING = TrainingConfig(
    steps=6, batch=4, optimizer=OptimizerConfig("adamw", weight_decay=0.1, epsilon=1e-4)
)


@pytest.fixture(scope="module")
def rows():
    draw = np.random.default_rng(0)
    ids = [draw.integers(1, 40, draw.integers(3, 9)) for _ in range(10)]
    return Examples(ids, draw.integers(0, 3, 10).astype(np.int32), length=8)


@pytest.fixture(scope="module")
def batches(rows):
    return Batches(rows, 4, seed=0)


@pytest.fixture(scope="module", params=SPECS)
def made(request, batches):
    params = MODEL.init(jax.random.key(0), batches[0]["tokens"])
    trials = Trials.compile(MODEL, params, SPECS[request.param], batches[0], TRAINING)
    return request.param, params, trials


def test_a_trial_has_the_numbers_of_a_training_at_that_rate(made, batches):
    name, _, trials = made
    trial = trials.start(seed=3, rate=2e-3)
    begin = jax.tree.map(np.array, trial.state.trainable)
    found = trials.advance(trial, batches, stop=6)
    optimizer = make_optimizer(replace(TRAINING.optimizer, learning_rate=2e-3), 6)
    forward = full_tuning(MODEL) if name == "full" else delta_tuning(attach(MODEL, SPECS[name]))
    step = jax.jit(make_train_step(classification(forward), optimizer))
    state = create_state(begin, optimizer, seed=3)
    for index in range(6):
        state, _ = step(state, found.frozen, batches[index])
    for ours, theirs in zip(*map(jax.tree.leaves, (found.state.trainable, state.trainable))):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (found.state.trainable, begin)))]
    assert max(moved) > 1e-3


def test_a_trial_goes_on_where_it_stood(made, batches):
    trials = made[2]
    whole = trials.advance(trials.start(1, 1e-3), batches, stop=6)
    parts = trials.advance(trials.advance(trials.start(1, 1e-3), batches, stop=2), batches, stop=6)
    for a, b in zip(*(jax.tree.leaves(each.state.trainable) for each in (whole, parts))):
        np.testing.assert_array_equal(a, b)


def test_seeds_draw_heads_and_the_backbone_is_shared(made):
    name, params, trials = made
    one, same, other = (trials.start(seed, 1e-3) for seed in (1, 1, 2))
    kernels = [
        (each.state.trainable if name == "full" else each.frozen["params"])["classifier"]["kernel"]
        for each in (one, same, other)
    ]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert np.abs(kernels[0] - kernels[2]).max() > 0.01
    if name == "lora":
        assert one.frozen["params"]["layers_0"] is params["layers_0"]
        trained = one.state.trainable["classifier"]["kernel"]["~full"]["value"]
        np.testing.assert_array_equal(trained, kernels[0])


def test_scores_are_the_models_own(made, rows):
    name, _, trials = made
    trial = trials.start(0, 1e-3)
    scores = trials.score(trial, rows, batch=4)
    assert scores.chosen.shape == scores.losses.shape == (10,)
    batch = {key: np.stack([rows[i][key] for i in range(10)]) for key in rows[0]}
    whole = trial.state.trainable if name == "full" else trial.frozen["params"]
    logits = MODEL.apply(whole, batch["tokens"], segments=batch["segments"], positions=batch["positions"])
    np.testing.assert_array_equal(scores.chosen, np.asarray(logits).argmax(-1))
    np.testing.assert_array_equal(scores.chosen, trials.score_merged(whole, rows, batch=4).chosen)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    np.testing.assert_allclose(scores.losses, expected, rtol=1e-4)


def test_a_state_without_a_rate_is_refused():
    optimizer = optax.adam(1e-3)
    with pytest.raises(InputError, match="with_rate_argument"):
        set_rate(create_state({"a": np.ones(2)}, optimizer), 1e-3)
