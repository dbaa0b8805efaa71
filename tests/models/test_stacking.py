"""Scanned, unrolled and recomputed layers compute the same, forward and backward."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import (
    FP32,
    FP64,
    MLP,
    GatedMLP,
    GroupedQuery,
    Layer,
    Transformer,
    TransformerConfig,
    stack_layers,
    unstack_layers,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

BASE = TransformerConfig(
    layers=2, width=8, vocab=19, attention=GroupedQuery(2), mlp=MLP(12), precision=FP64, scan=False
)
PATTERN = (Layer(), Layer(GroupedQuery(4, 2, window=2), GatedMLP(10)))
CASES = {
    "decoder-full": replace(BASE, remat="full"),
    "pattern-dots": replace(BASE, layers=4, pattern=PATTERN, remat="dots"),
    "encoder": replace(BASE, kind="encoder"),
    "encoder-decoder": replace(BASE, kind="encoder-decoder"),
}


def inputs(config):
    numbers = np.random.default_rng(0)
    tokens = numbers.integers(0, config.vocab, (2, 5))
    if config.kind != "encoder-decoder":
        return (tokens,), {}
    return (tokens,), {"decoder_tokens": numbers.integers(0, config.vocab, (2, 3))}


def value_and_gradient(model, params, args, kwargs):
    def score(params):
        logits = model.apply(params, *args, **kwargs)
        weights = jnp.sin(jnp.arange(logits.size)).reshape(logits.shape)  # any fixed direction
        return (logits * weights).sum(), logits

    (_, logits), gradient = jax.jit(jax.value_and_grad(score, has_aux=True))(params)
    return logits, gradient


@pytest.mark.parametrize("name", CASES)
def test_scanned_layers_compute_what_unrolled_ones_do(name, random_parameters, x64):
    config = CASES[name]
    args, kwargs = inputs(config)
    plain = Transformer(replace(config, remat="none"))
    params = random_parameters(plain, *args, **kwargs)
    logits, gradient = value_and_gradient(plain, params, args, kwargs)

    scanned = Transformer(replace(config, scan=True))
    stacked = stack_layers(params, config.period)
    scanned_logits, scanned_gradient = value_and_gradient(scanned, stacked, args, kwargs)

    np.testing.assert_allclose(scanned_logits, logits, rtol=0, atol=1e-12)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12),
        unstack_layers(scanned_gradient, config.period),
        gradient,
    )


@pytest.mark.parametrize("name", CASES)
def test_the_scanned_model_asks_for_the_stacked_tree(name, x64):
    config = CASES[name]
    args, kwargs = inputs(config)

    def shapes(model):
        return jax.eval_shape(model.init, jax.random.key(1), *args, **kwargs)

    unrolled, scanned = shapes(Transformer(config)), shapes(Transformer(replace(config, scan=True)))
    assert jax.eval_shape(lambda tree: stack_layers(tree, config.period), unrolled) == scanned
    assert jax.eval_shape(lambda tree: unstack_layers(tree, config.period), scanned) == unrolled


def test_there_and_back_is_the_same_tree():
    rows = {f"layers_{i}": {"kernel": jnp.full((2, 3), i), "norm": {"scale": jnp.ones(2)}} for i in range(12)}
    params = {"embedding": {"table": jnp.zeros((4, 2))}, "encoder": rows}
    for period in (1, 2, 3):
        back = unstack_layers(stack_layers(params, period), period)
        jax.tree.map(np.testing.assert_array_equal, back, params)


def test_rows_of_a_pattern_keep_their_order():
    params = {f"layers_{i}": {"scale": jnp.asarray([i])} for i in range(6)}
    stacked = stack_layers(params, 2)["layers"]
    assert stacked["layer_0"]["scale"].ravel().tolist() == [0, 2, 4]
    assert stacked["layer_1"]["scale"].ravel().tolist() == [1, 3, 5]


def test_layers_that_do_not_fill_the_pattern_are_an_error():
    params = {f"layers_{i}": {"scale": jnp.ones(1)} for i in range(3)}
    with pytest.raises(InputError, match="3 layers are not a multiple of the pattern's 2"):
        stack_layers(params, 2)


def test_a_recomputed_layer_stores_less():
    config = replace(BASE, width=32, mlp=MLP(256), precision=FP32)
    args, _ = inputs(config)
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), *args)

    def stored(remat):
        """Numbers kept for the backward pass."""
        model = Transformer(replace(config, remat=remat))
        pullback = jax.eval_shape(lambda p: jax.vjp(lambda p: model.apply(p, *args), p)[1], shapes)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert stored("full") < stored("dots") < stored("none")
