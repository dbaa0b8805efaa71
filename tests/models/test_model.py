"""The protocol, met by our Transformer, a Linen module we did not write, and forty lines of plain JAX."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import (
    MLP,
    LinenModel,
    Model,
    Transformer,
    TransformerConfig,
    as_linen,
    as_model,
    multi_head,
)
from modicum.research.training.config import OptimizerConfig, ScheduleConfig
from modicum.research.training.objectives import full_tuning, language_modelling
from modicum.research.training.optimizers import make_optimizer
from modicum.research.training.state import create_state
from modicum.research.training.step import make_train_step

pytestmark = pytest.mark.usefixtures("quick_compile")

VOCAB = 11


class ForeignModule(nn.Module):
    """A bag of words with batch-free layers, written as anybody might."""

    @nn.compact
    def __call__(self, tokens, train=False):
        x = nn.Embed(VOCAB, 16)(tokens)
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(VOCAB)(nn.relu(nn.Dense(16)(x)))


class PureModel(NamedTuple):
    """Attention over earlier tokens and one hidden layer, with no framework."""

    width: int = 16

    def init(self, rng, tokens):
        keys = jax.random.split(rng, 4)
        shapes = {
            "table": (VOCAB, self.width),
            "query": (self.width, self.width),
            "hidden": (self.width, self.width),
            "out": (self.width, VOCAB),
        }
        return {
            name: jax.random.normal(key, shape) / np.sqrt(shape[0])
            for key, (name, shape) in zip(keys, shapes.items())
        }

    def apply(self, params, tokens, rng=None, train=False):
        x = params["table"][tokens]
        scores = jnp.einsum("btd,de,bse->bts", x, params["query"], x) / np.sqrt(self.width)
        earlier = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        mixed = jax.nn.softmax(jnp.where(earlier, scores, -jnp.inf)) @ x
        hidden = x + jax.nn.relu(mixed @ params["hidden"])
        if train and rng is not None:
            hidden = hidden * jax.random.bernoulli(rng, 0.9, hidden.shape) / 0.9
        return hidden @ params["out"]


OURS = Transformer(
    TransformerConfig(layers=1, width=16, vocab=VOCAB, attention=multi_head(2), mlp=MLP(16), dropout=0.1)
)
MODELS = {"ours": OURS, "linen": LinenModel(ForeignModule()), "pure": PureModel()}
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (4, 6))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_a_pair_of_pure_functions(name):
    model = MODELS[name]
    assert isinstance(model, Model) and as_model(model) is model
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)
    again = jax.jit(model.init)(jax.random.key(0), TOKENS)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert "params" not in params  # a bare tree
    apply = jax.jit(model.apply, static_argnames="train")
    logits = apply(params, TOKENS)
    assert logits.shape == (4, 6, VOCAB)
    np.testing.assert_array_equal(apply(params, TOKENS, rng=jax.random.key(1)), logits)  # not training
    dropped = [apply(params, TOKENS, rng=jax.random.key(i), train=True) for i in (1, 1, 2)]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert np.abs(dropped[0] - dropped[2]).max() > 0


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains(name):
    """It learns to name the token it sees, in the step that every run uses."""
    model = MODELS[name]
    schedule = ScheduleConfig("constant", warmup=0)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.03, schedule=schedule), 60)
    step = make_train_step(language_modelling(full_tuning(model)), optimizer)
    state = create_state(jax.jit(model.init)(jax.random.key(0), TOKENS), optimizer)
    batch = {"tokens": TOKENS, "targets": TOKENS, "weights": np.ones(TOKENS.shape, np.float32)}

    @jax.jit
    def run(state):
        def body(state, _):
            state, metrics = step(state, {}, batch)
            return state, metrics["loss"]

        return jax.lax.scan(body, state, length=60)

    state, losses = run(state)
    assert int(state.step) == 60
    assert losses[0] > 2.0 and losses[-1] < 0.5


def test_a_bare_linen_module_is_wrapped():
    model = as_model(ForeignModule())
    assert isinstance(model, LinenModel)
    assert as_linen(ForeignModule()) == model == as_linen(model)


def test_train_reaches_only_modules_that_take_it():
    x = jnp.ones((1, 3))
    model = LinenModel(nn.Dense(2))
    params = model.init(jax.random.key(0), x)
    np.testing.assert_array_equal(model.apply(params, x, train=True), model.apply(params, x))


def test_a_module_with_state_is_refused():
    class Normalised(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True)(x)

    message = "Normalised keeps a collection 'batch_stats' beside its params"
    with pytest.raises(InputError, match=message):
        LinenModel(Normalised()).init(jax.random.key(0), jnp.ones((2, 3)))


def test_what_is_no_model_is_an_error():
    with pytest.raises(InputError, match="a model needs init and apply; dict has not both"):
        as_model({})
    with pytest.raises(InputError, match="PureModel is not a Linen model"):
        as_linen(PureModel())
