"""Ablation, patching, the lens and attention maps: each equals the run made by hand."""

import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import (
    MLP,
    Transformer,
    TransformerConfig,
    multi_head,
    run_with_cache,
    run_with_edits,
    stack_layers,
)
from modicum.models.attention import GroupedQuery
from modicum.models.hooks import site_shapes
from modicum.research.neurons import (
    Layers,
    ablate_each,
    activation_gradients,
    attention_maps,
    attribute,
    fixed,
    for_each,
    intervene,
    logit_lens,
    noised,
    patch_each,
    stacked,
    unchanged,
)
from modicum.research.neurons.interventions import with_noise

pytestmark = pytest.mark.usefixtures("quick_compile")

CLEAN, CORRUPTED = np.asarray([[3, 1, 4, 1], [5, 2, 6, 0]]), np.asarray([[3, 2, 4, 1], [5, 2, 6, 4]])
CONFIG = TransformerConfig(layers=3, width=8, vocab=7, attention=multi_head(2), mlp=MLP(6, "gelu"))
MODEL, SCANNED = Transformer(CONFIG), Transformer(replace(CONFIG, scan=True))
ACT = "layers_1/mlp/act"


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), CLEAN)
    numbers = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: numbers.normal(0, 0.5, leaf.shape).astype(leaf.dtype), shapes)


def last_logit(logits):
    return logits[:, -1, 2].sum()


def test_every_neuron_is_ablated_in_one_program(params):
    traces = []

    @jax.jit
    def all_neurons(params, values):
        traces.append(1)
        return ablate_each(
            MODEL, params, CLEAN, name=ACT, metric=lambda logits: logits[:, -1], values=values, chunk=4
        )

    found = all_neurons(params, jnp.zeros(6))
    assert found.shape == (6, 2, 7)
    by_hand = jax.jit(lambda mask: run_with_edits(MODEL, params, CLEAN, edits={ACT: lambda act: act * mask}))
    for neuron in range(6):
        np.testing.assert_allclose(found[neuron], by_hand(jnp.ones(6).at[neuron].set(0))[:, -1], atol=1e-5)
    shifted = all_neurons(params, jnp.arange(6.0))
    assert len(traces) == 1 and np.abs(shifted[1:] - found[1:]).max() > 1e-3
    np.testing.assert_allclose(shifted[0], found[0], atol=1e-6)


def test_a_layer_of_minilms_size_is_ablated_in_one_program():
    """Of 1,536 neurons exactly those that fire somewhere are missed."""
    model = Transformer(replace(CONFIG, layers=1, mlp=MLP(1536, "relu")), None)
    numbers = np.random.default_rng(2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), CLEAN)
    params = jax.tree.map(lambda leaf: numbers.normal(0, 0.5, leaf.shape).astype(leaf.dtype), shapes)
    params["layers_0"]["mlp"]["up"]["bias"][::3] = -50.0  # never fire
    traces = []

    @jax.jit
    def run(params):
        traces.append(1)
        hidden, seen = run_with_cache(model, params, CLEAN, names=["mlp/act"])
        found = ablate_each(model, params, CLEAN, name="layers_0/mlp/act", metric=lambda y: y, chunk=256)
        return jnp.abs(found - hidden).max((1, 2, 3)), seen["layers_0/mlp/act"]

    missed, act = run(params)
    assert len(traces) == 1 and missed.shape == (1536,)
    fires = np.asarray(act).max((0, 1)) > 0
    assert not fires[::3].any() and 600 < fires.sum() < 1024
    assert (missed[fires] > 1e-7).mean() > 0.99 and np.abs(missed[~fires]).max() < 1e-6


def test_heads_are_ablated_along_their_axis(params):
    name = "layers_0/attention/heads"
    found = jax.jit(lambda p: ablate_each(MODEL, p, CLEAN, name=name, metric=last_logit, axis=2))(params)
    for head in range(2):
        edits = {name: lambda x, head=head: x.at[:, :, head].set(0)}
        expected = last_logit(run_with_edits(MODEL, params, CLEAN, edits=edits))
        np.testing.assert_allclose(found[head], expected, rtol=1e-5)


def test_an_intervention_is_the_same_unrolled_and_scanned_and_maps(params):
    mask = np.random.default_rng(0).random((3, 6)) < 0.4
    means = np.random.default_rng(1).normal(size=(3, 6)).astype(np.float32)
    several = stacked([unchanged(mask.shape), fixed(mask), fixed(mask, means)])

    def run(model, params):
        layers = Layers.of(site_shapes(model, params, CLEAN, names=["mlp/act"]))
        return for_each(
            lambda one: intervene(model, params, CLEAN, intervention=one, layers=layers), several, chunk=2
        )

    found = jax.jit(lambda p: run(MODEL, p))(params)
    scanned = jax.jit(lambda p: run(SCANNED, p))(stack_layers(params))
    np.testing.assert_allclose(found, scanned, atol=2e-4)
    np.testing.assert_allclose(found[0], MODEL.apply(params, CLEAN), atol=1e-5)
    for number, values in ((1, np.zeros_like(means)), (2, means)):
        edits = {
            f"layers_{i}/mlp/act": lambda x, i=i, values=values: jnp.where(mask[i], values[i], x)
            for i in range(3)
        }
        expected = run_with_edits(MODEL, params, CLEAN, edits=edits)
        np.testing.assert_allclose(found[number], expected, atol=1e-4)


def test_noise_is_one_draw_for_an_example_and_neuron_and_only_where_it_is_asked_for(params):
    mask = np.zeros((3, 6), bool)
    mask[1, [0, 4]] = True
    layers = Layers.of(site_shapes(MODEL, params, CLEAN, names=["mlp/act"]))

    _, plain = run_with_cache(MODEL, params, CLEAN, names=["mlp/act"])

    def noisy(rng):
        values = layers.split((noised(mask, 0.1), jax.random.split(rng, 3)))
        return jnp.stack([with_noise(plain[path], value) - plain[path] for path, value in values.items()])

    added = np.asarray(jax.vmap(noisy)(jax.random.split(jax.random.key(0), 200)))  # [200, L, B, T, F]
    assert not added[:, ~mask.any(1)].any() and not added[:, 1][..., [1, 2, 3, 5]].any()
    drawn = added[:, 1][..., [0, 4]]
    np.testing.assert_allclose(drawn, np.broadcast_to(drawn[:, :, :1], drawn.shape), atol=1e-6)
    assert (
        abs(drawn.std() - 0.1) < 0.01 and abs(np.corrcoef(drawn[:, 0, 0, 0], drawn[:, 1, 0, 0])[0, 1]) < 0.25
    )
    without = intervene(MODEL, params, CLEAN, intervention=noised(mask, 0.1), layers=layers)
    np.testing.assert_allclose(without, MODEL.apply(params, CLEAN), atol=1e-6)


def test_patching_restores_position_by_position(params):
    def both(params):
        patched = patch_each(
            MODEL, params, CLEAN, CORRUPTED, name="layers_0/residual", metric=lambda y: y, axis=1
        )
        return patched, MODEL.apply(params, CLEAN), MODEL.apply(params, CORRUPTED)

    patched, clean, corrupted = jax.jit(both)(params)
    assert patched.shape == (4, *clean.shape)
    np.testing.assert_allclose(patched[0], corrupted, atol=1e-5)  # the first word is the same in both
    np.testing.assert_allclose(patched[1][0, 1], clean[0, 1], atol=1e-4)  # row 0 differs in word 1 only
    assert np.abs(patched[2][0] - clean[0]).max() > 1e-2


def test_attribution_is_exact_where_the_model_is_linear_and_an_estimate_elsewhere(params):
    def scores(params, clean, corrupted):
        names = ["layers_2/mlp/act"]
        effects = attribute(MODEL, params, clean, corrupted, names=names, metric=last_logit)
        patched = patch_each(
            MODEL, params, clean, corrupted, name=names[0], metric=last_logit, axis=-1
        ) - last_logit(MODEL.apply(params, corrupted))
        return effects[names[0]].sum((0, 1)), patched

    effects, patched = jax.jit(scores)(params, CLEAN, CORRUPTED)
    assert effects.shape == patched.shape == (6,)
    assert np.corrcoef(effects, patched)[0, 1] > 0.9

    def linear(params):
        model, wanted = Transformer(CONFIG, None), lambda hidden: hidden[..., 3].sum()
        effects = attribute(model, params, CLEAN, CORRUPTED, names=["final_norm"], metric=wanted)
        return effects["final_norm"], model.apply(params, CLEAN) - model.apply(params, CORRUPTED)

    effects, difference = jax.jit(linear)(params)
    np.testing.assert_allclose(effects[..., 3], difference[..., 3], atol=1e-6)
    assert not np.delete(np.asarray(effects), 3, -1).any()


def test_gradients_by_activations_come_stacked_from_scanned_layers(params):
    def gradients(model, params):
        return activation_gradients(model, params, CLEAN, names=["mlp/act"], metric=last_logit)

    found = jax.jit(lambda p: gradients(MODEL, p))(params)
    scanned = jax.jit(lambda p: gradients(SCANNED, p))(stack_layers(params))["layers/mlp/act"]
    for layer in range(3):
        np.testing.assert_allclose(scanned[layer], found[f"layers_{layer}/mlp/act"], atol=2e-4)


def test_the_lens_of_a_layer_is_a_model_that_ends_there(params):
    found = jax.jit(lambda p: logit_lens(MODEL, p, CLEAN))(params)
    scanned = jax.jit(lambda p: logit_lens(SCANNED, p, CLEAN))(stack_layers(params))
    np.testing.assert_allclose(scanned, found, atol=2e-4)
    for layers in (1, 2, 3):
        short = {
            name: tree for name, tree in params.items() if name not in ("layers_1", "layers_2")[layers - 1 :]
        }
        ended = Transformer(replace(CONFIG, layers=layers)).apply(short, CLEAN)
        np.testing.assert_allclose(found[layers - 1], ended, atol=1e-4)


def test_attention_maps_make_the_layers_output(caplog):
    config = replace(CONFIG, scan=True, attention=GroupedQuery(4, 2, window=3, soft_cap=5.0))
    model = Transformer(config)
    numbers = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), CLEAN)
    params = jax.tree.map(lambda leaf: numbers.normal(0, 0.5, leaf.shape).astype(leaf.dtype), shapes)

    def run(params):
        logits, maps = attention_maps(model, params, CLEAN)
        return logits, maps, run_with_cache(model, params, CLEAN, names=["attention/(value|heads)"])[1]

    with caplog.at_level(logging.INFO, "modicum.research.neurons.lens"):
        logits, maps, seen = jax.jit(run)(params)
    assert "attention weights by the reference" in caplog.text
    np.testing.assert_allclose(logits, jax.jit(model.apply)(params, CLEAN), atol=1e-5)
    path = "layers/attention"
    weights, value, heads = (tree[1] for tree in (maps[path], seen[f"{path}/value"], seen[f"{path}/heads"]))
    assert weights.shape == (2, 4, 4, 4)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert not np.triu(weights, 1).any() and not weights[:, :, 3, 0].any()  # causal, and a window of three
    grouped = np.repeat(np.asarray(value).reshape(2, 4, 2, 2), 2, axis=2)
    np.testing.assert_allclose(np.einsum("bhts,bshk->bthk", weights, grouped), heads, atol=1e-4)


def test_what_cannot_be_done_is_said(params):
    with pytest.raises(InputError, match="matches 3 sites"):
        ablate_each(MODEL, params, CLEAN, name="mlp/act", metric=last_logit)
    with pytest.raises(InputError, match="scanned: unroll the model"):
        ablate_each(SCANNED, stack_layers(params), CLEAN, name="mlp/act", metric=last_logit)
    with pytest.raises(InputError, match="must have one shape"):
        patch_each(MODEL, params, CLEAN, CLEAN[:, :2], name=ACT, metric=last_logit, axis=1)
    with pytest.raises(InputError, match="is in no layer"):
        logit_lens(MODEL, params, CLEAN, name="embedded")
    with pytest.raises(InputError, match="layer 0 has two of these sites"):
        logit_lens(MODEL, params, CLEAN, name="(middle|residual)")
