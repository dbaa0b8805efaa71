"""Means over a data set do not depend on how it falls into batches."""

import jax
import numpy as np
import pytest

from modicum import InputError
from modicum.research.training.evaluation import evaluate, make_evaluation
from modicum.research.training.objectives import (
    LossSums,
    classification,
    full_tuning,
    inputs_of,
    language_modelling,
)

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_means_do_not_depend_on_the_batches(tiny):
    model = tiny.TinyModel()
    params, data = model.init(jax.random.key(0)), tiny.batch_of(0, rows=12)
    sums_of = make_evaluation(tiny.loss_of(model))

    def means(size):
        batches = [
            {name: leaf[start : start + size] for name, leaf in data.items()} for start in range(0, 12, size)
        ]
        return evaluate(sums_of, params, {}, batches)

    whole = means(12)
    assert set(whole) == {"loss", "accuracy"}
    for size in (3, 4, 6):
        assert means(size) == pytest.approx(whole, rel=1e-6)
    logits = np.asarray(model.apply(params, data["tokens"]), np.float64)
    weights = data["weights"]
    right = logits.argmax(-1) == data["targets"]
    assert whole["accuracy"] == pytest.approx((right * weights).sum() / weights.sum(), rel=1e-6)


def test_rows_that_only_fill_a_batch_weigh_nothing(tiny):
    model = tiny.TinyModel()
    params, sums_of = model.init(jax.random.key(0)), make_evaluation(tiny.loss_of(model))
    short = tiny.batch_of(0, rows=3)
    filled = {name: np.concatenate([leaf, leaf[:1]]) for name, leaf in short.items()}
    filled["weights"][3] = 0
    assert evaluate(sums_of, params, {}, [filled]) == pytest.approx(evaluate(sums_of, params, {}, [short]))


def test_evaluation_is_without_dropout(tiny):
    model = tiny.TinyModel(dropout=0.9)
    params = model.init(jax.random.key(0))
    dropped, plain = (
        evaluate(make_evaluation(tiny.loss_of(each)), params, {}, [tiny.batch_of(0)])
        for each in (model, tiny.TinyModel(dropout=0.0))
    )
    assert dropped == plain


def test_many_small_sums_are_added_in_float64():
    """In float32 the sum of a large and a hundred small numbers would lose the small ones."""
    numbers = [2.0**25] + [1.0] * 100

    def sums(trainable, frozen, batch):
        return LossSums(np.float32(batch["x"]), np.float32(1), {})

    means = evaluate(sums, {}, {}, [{"x": number} for number in numbers])
    assert means["loss"] == (2**25 + 100) / 101


@pytest.mark.parametrize("batches", ["none", "weightless"])
def test_nothing_to_evaluate_is_an_error(batches, tiny):
    model = tiny.TinyModel()
    weightless = tiny.batch_of(0)
    weightless["weights"] = np.zeros_like(weightless["weights"])
    given = {"none": [], "weightless": [weightless]}[batches]
    with pytest.raises(InputError, match="nothing to evaluate: the data set has no rows"):
        evaluate(make_evaluation(tiny.loss_of(model)), model.init(jax.random.key(0)), {}, given)


class Constant:
    """Scores that do not depend on the input, to count by hand; remembers what it was called with."""

    seen: dict = {}  # noqa: RUF012

    def init(self, rng):
        return {"logits": np.log(np.asarray([0.5, 0.25, 0.25], np.float32))}

    def apply(self, params, tokens, rng=None, train=False, **inputs):
        self.seen = {"train": train, **inputs}
        return np.broadcast_to(params["logits"], (*tokens.shape[:1], 3))


def test_classification_counts_rows():
    model = Constant()
    loss = classification(full_tuning(model))
    batch = {"tokens": np.zeros((4, 2), np.int32), "label": np.asarray([0, 0, 1, 2])}
    batch["weight"] = np.asarray([1, 1, 1, 0], np.float32)
    sums = loss(model.init(None), {}, batch, None)
    assert sums.weight == 3
    assert float(sums.total) == pytest.approx(2 * np.log(2) + np.log(4))
    assert sums.metrics["accuracy"] == 2
    assert model.seen == {"train": False}


def test_a_model_is_given_what_of_a_batch_is_for_it():
    inputs = {name: np.zeros((1, 2), np.int32) for name in ("segments", "positions", "decoder_tokens")}
    batch = {"tokens": 0, "targets": 0, "weights": 0, "label": 0, **inputs}
    assert set(inputs_of(batch)) == set(inputs)


def test_smoothing_reaches_the_loss(tiny):
    model = tiny.TinyModel(dropout=0.0)
    params, batch = model.init(jax.random.key(0)), tiny.batch_of(0)
    plain, smooth = (
        language_modelling(full_tuning(model), smoothing)(params, {}, batch, None).total
        for smoothing in (0.0, 0.2)
    )
    assert abs(float(plain) - float(smooth)) > 1e-3
