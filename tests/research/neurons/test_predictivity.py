"""Neurons that are known to tell labels apart are found, exactly they, and none where labels are shuffled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.research import delta
from modicum.research.neurons import (
    Correlation,
    Positions,
    Predictivity,
    Subtask,
    TokenMax,
    TokenMean,
    activations,
    in_layers,
    one_against_rest,
    over_trials,
    random_like,
    select,
)
from modicum.research.neurons.reading import model_inputs

pytestmark = pytest.mark.usefixtures("quick_compile")

DETECTORS = {(0, 3): 5, (1, 9): 6}


LARGEST = TokenMax()


def reader_of(model, read=LARGEST):
    return lambda params, batch: activations(model, params, batch, read=read)


@pytest.fixture(scope="module")
def found(planted, texts):
    """Thresholds of the planted neurons, and accuracies on two other sets, one with shuffled labels."""
    model, params = planted(DETECTORS)
    probe = Predictivity(reader_of(model), one_against_rest(2))
    thresholds = probe.thresholds(params, texts(256, (6, 5), seed=1))
    accuracy = probe.accuracy(params, texts(256, (6, 5), seed=2), thresholds)
    shuffled = probe.accuracy(params, texts(256, (6, 5), seed=3, shuffled=True), thresholds)
    return probe, params, thresholds, accuracy, shuffled


def test_the_planted_neurons_are_found_with_their_directions_and_no_others(found):
    _, _, thresholds, accuracy, _ = found
    assert thresholds.shape == accuracy.values.shape == (1, 2, 1, 16)
    exact = {tuple(index) for index in np.argwhere(accuracy.predictivity == 1.0)}
    assert exact == {(0, 0, 0, 3), (0, 1, 0, 9)}  # subtask, layer, position, neuron
    assert accuracy.values[0, 0, 0, 3] == 1.0 and accuracy.values[0, 1, 0, 9] == 0.0
    top = accuracy.top()
    assert top == (0, 0, 3, True, 1.0) and accuracy.of(top) == 1.0
    others = np.delete(accuracy.predictivity.reshape(-1), [3, 16 + 9])
    assert others.max() < 0.65


def test_shuffled_labels_have_no_skill_neurons(found):
    *_, shuffled = found
    assert shuffled.predictivity.max() < 0.65  # of 32 neurons on 256 examples


def test_padding_is_not_read(planted, texts):
    model, params = planted(DETECTORS)
    (batch,) = texts(32, (6, 5))
    seen = jax.jit(reader_of(model))(params, batch)
    real = np.where(batch["segments"] > 0, batch["tokens"], 0)
    np.testing.assert_array_equal(np.asarray(seen[:, 0, 0, 3]) > 0, (real == 5).any(1))
    mean = jax.jit(reader_of(model, TokenMean()))(params, batch)[:, 0, 0, 3]
    np.testing.assert_allclose(
        mean, seen[:, 0, 0, 3] * (real == 5).mean(1) * 6 / (real > 0).sum(1), rtol=1e-5
    )


def test_many_labels_are_so_many_questions(planted, texts):
    model, params = planted({(0, 2): 5, (1, 11): 6, (1, 4): 7})
    probe = Predictivity(reader_of(model), one_against_rest(3))
    accuracy = probe.accuracy(
        params, texts(192, (5, 6, 7), seed=2), probe.thresholds(params, texts(192, (5, 6, 7), seed=1))
    )
    tops = [accuracy.top(subtask)[:3] for subtask in range(3)]
    assert tops == [(0, 0, 2), (1, 0, 11), (1, 0, 4)]
    assert all(accuracy.top(subtask).accuracy == 1.0 for subtask in range(3))
    mask = select(accuracy.by_neuron(), 2 / 16)
    assert mask.sum(1).tolist() == [2, 2] and mask[0, 2] and mask[1, 4] and mask[1, 11]


def test_frequent_labels_make_no_neuron_good_unless_asked_to(planted, texts):
    """A neuron that never fires is right about the majority; balanced, it is right half of the time."""
    model, params = planted(DETECTORS)

    def dead(labels):
        batches = texts(256, (6, 5), seed=4)
        for batch in batches:
            batch["label"] = np.where(np.arange(32) % 8 == 0, 1, 0).astype(np.int32) * labels
        probes = [
            Predictivity(reader_of(model), one_against_rest(2), balanced=each) for each in (True, False)
        ]
        return [probe.accuracy(params, batches, np.full((1, 2, 1, 16), 1e9, np.float32)) for probe in probes]

    balanced, printed = dead(1)
    np.testing.assert_array_equal(balanced.values, 0.5)
    np.testing.assert_allclose(printed.values, 7 / 8)
    with pytest.raises(InputError, match="no example has a positive label"):
        dead(0)


def test_filling_rows_count_for_nothing(found, texts):
    probe, params, thresholds, accuracy, _ = found
    batches = texts(256, (6, 5), seed=2)
    filled = [
        {**batch, "weight": batch["weight"].copy(), "label": batch["label"].copy()} for batch in batches
    ]
    filled.append({**batches[0], "label": 1 - batches[0]["label"], "weight": np.zeros(32, np.float32)})
    np.testing.assert_array_equal(probe.accuracy(params, filled, thresholds).values, accuracy.values)


def test_positions_of_a_prompt_are_read_in_front_of_the_text(planted, texts):
    model, params = planted(DETECTORS)
    tuned = delta.attach(model, {"": delta.SoftPrompt(length=4, tokens=(5, 1, 6, 2))})
    (batch,) = texts(8, (6, 5), size=8)
    variables = tuned.init(jax.random.key(0), params, batch["tokens"], **model_inputs(batch))

    def read(variables, read):
        return activations(tuned.bind(variables), params, batch, read=read, prompt=4)

    at_prompt = jax.jit(lambda v: read(v, Positions(0, 4)))(variables)
    assert at_prompt.shape == (8, 2, 4, 16)
    np.testing.assert_array_equal(np.asarray(at_prompt[:, 0, :, 3]) > 0, [[True, False, False, False]] * 8)
    np.testing.assert_array_equal(np.asarray(at_prompt[:, 1, :, 9]) > 0, [[False, False, True, False]] * 8)
    over = jax.jit(lambda v: read(v, TokenMax()))(variables)
    assert (np.asarray(over[:, 0, 0, 3]) > 0).all()
    with pytest.raises(InputError, match="positions up to 99"):
        read(variables, Positions(0, 99))


def test_correlations_are_numpys_whatever_the_batches(planted, texts):
    model, params = planted(DETECTORS)
    params["layers_0"]["mlp"]["up"]["bias"][:] += 100  # a mean far from zero, which naive sums would drown in
    reader, metric = reader_of(model, TokenMean()), lambda params, batch: jnp.asarray(batch["label"])
    batches = texts(96, (6, 5), size=32)
    found = Correlation(reader, metric)(params, batches)
    seen = np.concatenate([jax.jit(reader)(params, batch) for batch in batches]).astype(np.float64)
    label = np.concatenate([batch["label"] for batch in batches])
    expected = [[np.corrcoef(seen[:, layer, 0, n], label)[0, 1] for n in (3, 0, 1)] for layer in range(2)]
    np.testing.assert_allclose(found[:, 0, [3, 0, 1]], expected, atol=2e-3)
    assert found.shape == (2, 1, 16) and found[0, 0, 3] > 0.9 and found[1, 0, 9] < -0.9
    with pytest.raises(InputError, match="the metric is 2 for every example"):
        Correlation(reader, lambda params, batch: jnp.full(batch["label"].shape, 2))(params, batches)


def test_selection_is_per_layer_and_shares_the_budget():
    numbers = np.random.default_rng(0)
    predictivity = 0.5 + numbers.random((2, 3, 20)) / 4
    predictivity[:, 2] += 0.25  # the last layer is better as a whole, and yet gets no more
    mask = select(predictivity, 0.2)
    assert mask.sum(1).tolist() == [4, 4, 4]
    for layer in range(3):
        best = {int(predictivity[subtask, layer].argmax()) for subtask in range(2)}
        assert best <= set(np.flatnonzero(mask[layer]))
    same = select(np.repeat(predictivity[:1], 2, 0), 0.2)  # two questions with the same neurons: four still
    np.testing.assert_array_equal(same, select(predictivity[:1], 0.2))
    control = random_like(mask, 1)
    assert control.sum(1).tolist() == [4, 4, 4] and (control != mask).any()
    assert in_layers(mask, range(1, 3)).sum(1).tolist() == [0, 4, 4]
    trials = [predictivity, predictivity[:, :, ::-1]]
    np.testing.assert_allclose(over_trials(trials), np.mean(trials, 0))
    np.testing.assert_allclose(over_trials(trials, "min"), np.min(trials, 0))


def test_what_cannot_be_asked_is_said(planted, texts):
    model, params = planted(DETECTORS)
    with pytest.raises(InputError, match="has nothing to tell apart"):
        one_against_rest(1)
    with pytest.raises(InputError, match="without a common one"):
        Subtask((0, 1), (1,))
    with pytest.raises(InputError, match="above 0 and at most 1"):
        select(np.ones((1, 1, 4)), 0.0)
    with pytest.raises(InputError, match="no batches"):
        Predictivity(reader_of(model), one_against_rest(2)).thresholds(params, [])
    with pytest.raises(InputError, match="'mean' or 'min'"):
        over_trials([np.ones(3)], "max")
