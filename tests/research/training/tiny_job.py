"""A small language-model job in plain JAX: compiles in a moment, and has matrices, tables and vectors.

Loaded by path, by the tests (fixture `tiny`) and by `killed_training.py`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from modicum.research.training.evaluation import evaluate, make_evaluation
from modicum.research.training.job import Job
from modicum.research.training.objectives import full_tuning, language_modelling

VOCAB, WIDTH, LENGTH, ROWS = 13, 8, 6, 4


@dataclass(frozen=True)
class TinyModel:
    """Word vectors, one hidden layer with dropout, a linear read-out."""

    dropout: float = 0.1
    width: int = WIDTH

    def init(self, rng, dtype=jnp.float32):
        keys = jax.random.split(rng, 3)

        def kernel(key, rows, columns):
            return (jax.random.normal(key, (rows, columns), jnp.float32) / np.sqrt(rows)).astype(dtype)

        return {
            "embedding": {"table": kernel(keys[0], VOCAB, self.width)},
            "hidden": {
                "kernel": kernel(keys[1], self.width, self.width),
                "bias": jnp.zeros(self.width, dtype),
            },
            "head": {"kernel": kernel(keys[2], self.width, VOCAB)},
        }

    def apply(self, params, tokens, rng=None, train=False, **inputs):
        x = params["embedding"]["table"][tokens]
        x = x + jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
        if train and rng is not None and self.dropout:
            x = x * jax.random.bernoulli(rng, 1 - self.dropout, x.shape) / (1 - self.dropout)
        return x @ params["head"]["kernel"]


def batch_of(step, rows=ROWS, seed=0):
    """Rows of a repeating rule (the next word is 3 w + 1) with uneven weights, a function of the step."""
    numbers = np.random.default_rng([seed, step])
    words = [numbers.integers(0, VOCAB, (rows, 1))]
    for _ in range(LENGTH):
        words.append((3 * words[-1] + 1) % VOCAB)
    text = np.concatenate(words, 1).astype(np.int32)
    weights = (numbers.random((rows, LENGTH)) < 0.7).astype(np.float32)
    weights[0, 0] = 1.0
    return {"tokens": text[:, :-1], "targets": text[:, 1:], "weights": weights}


def loss_of(model):
    """The language-modelling loss of full tuning."""
    return language_modelling(full_tuning(model))


def job_of(model=None, batches=batch_of, **options):
    """The job, evaluated on three batches that training does not see."""
    model = model or TinyModel()
    loss = loss_of(model)
    sums_of = make_evaluation(loss)
    held_out = [batch_of(step, seed=1) for step in range(3)]
    options.setdefault("evaluate", lambda trainable, frozen: evaluate(sums_of, trainable, frozen, held_out))
    return Job(loss=loss, init=lambda rng, frozen: model.init(rng), batches=batches, **options)
