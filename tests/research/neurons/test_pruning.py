"""A pruned model is the model with the removed neurons held at their means; nothing is counted twice."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from modicum import InputError
from modicum.models import MLP, Transformer, TransformerConfig, multi_head, run_with_cache
from modicum.models.config import Layer
from modicum.models.hooks import site_shapes
from modicum.models.mlp import GatedMLP
from modicum.research.neurons import (
    Layers,
    Perturbed,
    bootstrap,
    fixed,
    intervene,
    neuron_site,
    prune,
    stacked,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

TOKENS = np.asarray([[3, 1, 4, 1], [5, 2, 6, 0]])
CONFIG = TransformerConfig(layers=3, width=8, vocab=7, attention=multi_head(2), mlp=MLP(6, "gelu"))
NUMBERS = np.random.default_rng(5)
KEEP = NUMBERS.random((3, 6)) < 0.5
KEEP[:, 2] = True
KEEP[1] = True  # a layer that stays whole
MEANS = NUMBERS.normal(size=(3, 6)).astype(np.float32)


def random_params(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    numbers = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: numbers.normal(0, 0.5, leaf.shape).astype(leaf.dtype), shapes)


CASES = {
    "with bias": (MLP(6, "gelu"), False),
    "gated, without": (GatedMLP(6), False),
    "scaled": (GatedMLP(6), True),
}


@pytest.mark.parametrize(("mlp", "scaled"), CASES.values(), ids=CASES)
def test_pruning_is_holding_at_the_mean(mlp, scaled):
    config = replace(CONFIG, mlp=mlp, scaled_linears=scaled)
    model, site = Transformer(config), neuron_site(config)
    params = random_params(model)
    pruned, fewer = prune(model, params, KEEP, MEANS)
    layers = Layers.of(site_shapes(model, params, TOKENS, names=[site]))
    expected = intervene(model, params, TOKENS, intervention=fixed(~KEEP, MEANS), layers=layers, name=site)
    np.testing.assert_allclose(pruned.apply(fewer, TOKENS), expected, atol=2e-5)
    widths = [shape.shape[-1] for shape in site_shapes(pruned, fewer, TOKENS, names=[site]).values()]
    assert widths == KEEP.sum(1).tolist() and fewer["layers_1"] is params["layers_1"]
    by_init = jax.eval_shape(pruned.init, jax.random.key(0), TOKENS)
    assert jax.tree.map(np.shape, dict(by_init)) == jax.tree.map(np.shape, fewer)


def test_constant_neurons_cost_nothing_and_kept_means_are_not_added():
    """Neurons that never vary are removed without a trace; with all means in the bias it would not be so."""
    model = Transformer(replace(CONFIG, layers=1))
    params = random_params(model)
    keep = np.asarray([[True, True, False, False, True, False]])
    kernel = params["layers_0"]["mlp"]["up"]["kernel"].copy()
    kernel[:, ~keep[0]] = 0  # what is left is the bias: constant
    params["layers_0"]["mlp"]["up"]["kernel"] = kernel
    seen = run_with_cache(model, params, TOKENS, names=["mlp/act"])[1]["layers_0/mlp/act"]
    pruned, fewer = prune(model, params, keep, np.asarray(seen.mean((0, 1)))[None])
    whole = np.asarray(model.apply(params, TOKENS))
    np.testing.assert_allclose(pruned.apply(fewer, TOKENS), whole, atol=1e-5)
    twice = {**fewer["layers_0"]["mlp"]["down"]}
    twice["bias"] = twice["bias"] + np.asarray(seen.mean((0, 1)))[keep[0]] @ twice["kernel"]
    wrong = {**fewer, "layers_0": {**fewer["layers_0"], "mlp": {**fewer["layers_0"]["mlp"], "down": twice}}}
    assert np.abs(np.asarray(pruned.apply(wrong, TOKENS)) - whole).max() > 0.05


def test_what_cannot_be_pruned_is_said():
    model = Transformer(CONFIG)
    params = random_params(model)
    with pytest.raises(InputError, match="layer 0 would have no neuron left"):
        prune(model, params, np.zeros((3, 6), bool), MEANS)
    with pytest.raises(InputError, match=r"must be \(3, 6\)"):
        prune(model, params, KEEP[:, :5], MEANS)
    with pytest.raises(InputError, match="not scanned layers"):
        prune(Transformer(replace(CONFIG, scan=True)), params, KEEP, MEANS)
    mixed = replace(CONFIG, layers=2, pattern=(Layer(), Layer(mlp=GatedMLP(6))))
    with pytest.raises(InputError, match="at no one site"):
        neuron_site(mixed)


def test_removing_the_planted_neurons_destroys_the_skill_and_random_ones_do_not(planted, texts):
    """The classifier is made to read two detectors: held at 0 nothing is left, others do not matter."""
    model, params = planted({(0, 3): 5, (0, 9): 6})
    width = params["embedding"]["table"].shape[1]
    down, head = np.zeros((16, width), np.float32), np.zeros((width, 2), np.float32)
    down[3, 20], down[9, 21] = 30, 30
    params["layers_0"]["mlp"]["down"]["kernel"] = down
    head[20, 1], head[21, 0] = 1, 1
    params["classifier"]["kernel"] = head
    params["embedding"]["table"][:, 20:22] = 0
    batches = texts(96, (6, 5), seed=9)
    layers = Layers.of(site_shapes(model, params, batches[0]["tokens"], names=["mlp/act"]))

    def logits(params, batch, intervention, rng):
        given = {"intervention": intervention, "layers": layers, "rng": rng}
        return intervene(model, params, batch["tokens"], segments=batch["segments"], **given)

    masks = np.zeros((3, 2, 16), bool)
    masks[1, 0, [3, 9]] = True
    masks[2, 0, [0, 1, 2, 4, 5, 6]] = True
    batches[-1]["weight"][:4] = 0
    correct = Perturbed(logits)(params, batches, stacked([fixed(mask) for mask in masks]))
    assert correct.shape == (3, 92)
    whole, without_skill, without_others = correct.mean(1)
    assert whole == without_others == 1.0 and 0.3 < without_skill < 0.7
    gap = bootstrap(100.0 * (correct[2] - correct[1].astype(float)))
    assert gap.low > 20 and gap.low < gap.mean < gap.high
    assert bootstrap(np.zeros(9)) == (0, 0, 0) and str(bootstrap(-np.zeros(9))) == "+0.0 [+0.0, +0.0]"
    with pytest.raises(InputError, match=r"\(2, 2, 2, 2\)"):
        bootstrap(np.zeros((2, 2, 2, 2)))


def test_draws_are_resampled_as_examples_are():
    """Of draws and examples with effects around 0, 95 of 100 intervals contain it; of examples alone, few."""
    numbers, covered, alone = np.random.default_rng(0), 0, 0
    for trial in range(100):
        table = numbers.normal(0, 3, (8, 1)) + numbers.normal(0, 3, 60) + numbers.normal(0, 3, (8, 60))
        both, examples = bootstrap(table, trial, 400), bootstrap(table.mean(0), trial, 400)
        covered += both.low <= 0 <= both.high
        alone += examples.low <= 0 <= examples.high
    assert covered >= 85 and alone < 60


def test_seeds_are_resampled_with_draws_of_their_own():
    """Effects of six seeds: 95 of 100 intervals contain 0, few where seeds count as so many more draws."""
    numbers, covered, pooled = np.random.default_rng(1), 0, 0
    for trial in range(100):
        table = numbers.normal(0, 3, (6, 1, 1)) + numbers.normal(0, 1, (6, 4, 1)) + numbers.normal(0, 1, 40)
        nested = bootstrap(table, trial, 400)
        flat = bootstrap(table.reshape(24, 40), trial, 400)
        covered += nested.low <= 0 <= nested.high
        pooled += flat.low <= 0 <= flat.high
    assert covered >= 80 and pooled < 70
    one = numbers.normal(size=(5, 30))
    assert bootstrap(one[None]) == bootstrap(one)
    np.testing.assert_allclose(bootstrap(one[:1]), bootstrap(one[0]))


def test_of_few_seeds_intervals_are_too_narrow():
    """What the docstring warns of: seeds differ, draws and examples do not."""
    numbers = np.random.default_rng(2)

    def covered(*shape):
        tables = numbers.normal(0, 3, (100, *shape)) + numbers.normal(0, 0.01, (100, *shape[:2], 6))
        found = [bootstrap(table, trial, 400) for trial, table in enumerate(tables)]
        return np.mean([each.low <= 0 <= each.high for each in found])

    assert covered(2, 1, 1) < 0.6 < covered(3, 1, 1) < 0.8 < covered(1, 8, 1) < 0.95
    assert covered(1, 8, 6) > 0.98  # noise of each draw and example
