"""Floating-point operations counted by formula and by XLA."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from modicum import InputError
from modicum.models import (
    MLP,
    GatedMLP,
    GroupedQuery,
    Positions,
    RMSNorm,
    Transformer,
    TransformerConfig,
    multi_head,
)
from modicum.models.costs import matrix_weights, training_flops_per_token

BASE = TransformerConfig(
    layers=2,
    width=256,
    vocab=1024,
    attention=multi_head(4, bias=False, implementation="reference"),
    mlp=MLP(1024, "relu", bias=False),
    norm=RMSNorm(),
    positions=Positions(),
)


def compiled_flops(config, rows, length):
    """XLA's count for loss and gradient, per token."""
    tokens = np.zeros((rows, length), np.int32)
    model = Transformer(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)

    def loss(params, tokens):
        return (model.apply(params, tokens) ** 2).sum()

    compiled = jax.jit(jax.grad(loss)).lower(shapes, tokens).compile()
    return compiled.cost_analysis()["flops"] / tokens.size


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_the_formula_is_what_xla_counts(kind):
    """Within 3%, above: XLA counts norms, softmax and activations too, which are no model FLOPs.

    The reference attention computes masked scores as well, so for a decoder the causal half is added back.
    """
    config, length = replace(BASE, kind=kind), 64
    counted = compiled_flops(config, 2, length)
    formula = training_flops_per_token(config, length)
    if kind == "decoder":
        formula += 6 * config.layers * length * config.width
    print(f"{kind}: XLA {counted:,.0f}, formula {formula:,.0f} a token: {counted / formula - 1:+.2%}")
    assert 1.0 <= counted / formula < 1.03


def test_the_terms():
    config = replace(BASE, kind="encoder")
    weights = 2 * (4 * 256**2 + 2 * 256 * 1024) + 1024 * 256
    assert matrix_weights(config) == matrix_weights(replace(config, tied=False)) == weights
    attention = 12 * 2 * 256 * 64
    assert training_flops_per_token(config, 64) == 6 * weights + attention
    assert training_flops_per_token(replace(config, kind="decoder"), 64) == 6 * weights + attention / 2


def test_grouped_queries_save_weights_but_not_scores():
    grouped = replace(BASE, attention=GroupedQuery(4, 1, bias=False))
    saved = 2 * 2 * 256 * (256 - 64)
    assert training_flops_per_token(BASE, 64) - training_flops_per_token(grouped, 64) == 6 * saved


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("window", [1, 16, 64, 100])
def test_a_window_counts_the_scores_inside_it(kind, window):
    config = replace(BASE, kind=kind, attention=multi_head(4, bias=False, window=window))
    length, distance = 64, np.arange(64)[:, None] - np.arange(64)
    inside = (np.abs(distance) < window) & ((distance >= 0) | (kind == "encoder"))
    attention = training_flops_per_token(config, length) - 6 * matrix_weights(config)
    counted = attention * length / (12 * config.layers * config.width)
    assert counted == pytest.approx(inside.sum(), abs=length)  # by less than a diagonal


def test_gated_layers_have_a_third_matrix():
    gated = replace(BASE, mlp=GatedMLP(1024, "relu", bias=False))
    assert matrix_weights(gated) - matrix_weights(BASE) == 2 * 256 * 1024


def test_an_encoder_decoder_is_refused():
    with pytest.raises(InputError, match="not an encoder-decoder"):
        training_flops_per_token(replace(BASE, kind="encoder-decoder"), 64)


def test_recomputation_does_not_count():
    assert training_flops_per_token(replace(BASE, remat="full"), 64) == training_flops_per_token(BASE, 64)


def test_counting_allocates_nothing():
    gpt3 = replace(BASE, width=12_288, layers=96, attention=multi_head(96), mlp=MLP(4 * 12_288), scan=True)
    before = len(jax.live_arrays())
    assert training_flops_per_token(gpt3, 2048) > 6 * 170e9
    assert len(jax.live_arrays()) <= before + 1  # the random key
