"""Heads that share keys and values, windows, and the options of the layer."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import (
    FP64,
    MLP,
    GroupedQuery,
    Layer,
    Transformer,
    TransformerConfig,
    multi_head,
    multi_query,
    run_with_cache,
    run_with_edits,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = TransformerConfig(layers=1, width=12, vocab=11, attention=multi_head(4), mlp=MLP(8), precision=FP64)
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 6))


def apply(config, params, *args, **kwargs):
    return jax.jit(Transformer(config).apply)(params, *args, **kwargs)


def repeat_key_value_heads(params, groups, heads):
    """The multi-head parameters that compute what `groups` shared heads do."""
    attention = params["layers_0"]["attention"]

    def repeat(leaf):
        each = leaf.reshape(*leaf.shape[:-1], groups, -1)
        return jnp.repeat(each, heads // groups, axis=-2).reshape(*leaf.shape[:-1], -1)

    shared = {name: jax.tree.map(repeat, attention[name]) for name in ("key", "value")}
    return {**params, "layers_0": {**params["layers_0"], "attention": {**attention, **shared}}}


@pytest.mark.parametrize("attention", [GroupedQuery(4, 2), multi_query(4)], ids=["grouped", "one"])
def test_shared_heads_equal_heads_with_repeated_kernels(attention, random_parameters, x64):
    shared = replace(CONFIG, attention=attention)
    params = random_parameters(Transformer(shared), TOKENS)
    assert params["layers_0"]["attention"]["key"]["kernel"].shape == (12, 3 * attention.groups)
    repeated = repeat_key_value_heads(params, attention.groups, 4)
    np.testing.assert_allclose(
        apply(shared, params, TOKENS), apply(CONFIG, repeated, TOKENS), rtol=0, atol=1e-12
    )


def scores_by_hand(params, x, allowed, heads, scale, cap=0.0):
    attention = params["layers_0"]["attention"]

    def project(name):
        y = x @ attention[name]["kernel"] + attention[name]["bias"]
        return y.reshape(*x.shape[:2], heads, -1)

    query, key, value = (np.asarray(project(name)) for name in ("query", "key", "value"))
    scores = np.einsum("bthk,bshk->bhts", query, key) * scale
    scores = cap * np.tanh(scores / cap) if cap else scores
    weights = np.where(allowed, np.exp(scores), 0)
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("bhts,bshk->bthk", weights, value).reshape(*x.shape[:2], -1)
    return y @ attention["output"]["kernel"] + attention["output"]["bias"]


@pytest.mark.parametrize(
    "kind, options",
    [
        ("decoder", {}),
        ("decoder", {"window": 2}),
        ("encoder", {"window": 2}),
        ("encoder", {"scale": 0.2, "soft_cap": 0.5}),
        ("decoder", {"head_width": 5}),
    ],
)
def test_the_layer_is_its_formula(kind, options, random_parameters, x64):
    config = replace(CONFIG, kind=kind, attention=multi_head(4, **options))
    model = Transformer(config)
    params = random_parameters(model, TOKENS)
    names = ["attention_norm", "layers_0/attention"]
    _, seen = jax.jit(lambda params: run_with_cache(model, params, TOKENS, names=names))(params)
    distance = np.arange(6)[:, None] - np.arange(6)
    window = options.get("window", 6)
    allowed = (np.abs(distance) < window) & ((distance >= 0) | (kind == "encoder"))
    scale = options.get("scale", options.get("head_width", 3) ** -0.5)
    expected = scores_by_hand(
        params, seen["layers_0/attention_norm"], allowed, 4, scale, options.get("soft_cap", 0.0)
    )
    np.testing.assert_allclose(seen["layers_0/attention"], expected, rtol=0, atol=1e-12)


def test_cross_attention_has_no_window(random_parameters, x64):
    wide = replace(CONFIG, kind="encoder-decoder")
    narrow = replace(wide, attention=multi_head(4, window=1))
    one = TOKENS[:, :1]  # a decoder of one token: no window hides anything from it
    params = random_parameters(Transformer(wide), TOKENS, decoder_tokens=one)

    def score(shift):
        edits = {"encoder/final_norm": lambda memory: memory + shift[:, None]}
        logits = run_with_edits(Transformer(narrow), params, TOKENS, decoder_tokens=one, edits=edits)
        return logits[..., 0].sum()

    assert (np.abs(jax.jit(jax.grad(score))(jnp.zeros(6))) > 0).all()  # it reads every position


def test_each_layer_of_a_pattern_has_its_own_cross_attention_heads(x64):
    config = replace(
        CONFIG, kind="encoder-decoder", layers=2, pattern=(Layer(), Layer(attention=multi_query(4)))
    )
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), TOKENS, decoder_tokens=TOKENS)
    widths = [
        shapes["decoder"][f"layers_{i}"]["cross_attention"]["key"]["kernel"].shape[-1] for i in range(2)
    ]
    assert widths == [12, 3]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"heads": 0}, "heads=0"),
        ({"heads": 4, "kv_heads": 3}, "4 heads, which 3 kv_heads do not divide"),
        ({"heads": 4, "kv_heads": -2}, "kv_heads=-2"),
        ({"heads": 4, "window": -1}, "window=-1"),
        ({"heads": 4, "head_width": -1}, "head_width=-1"),
    ],
)
def test_impossible_heads_are_errors(options, message):
    with pytest.raises(InputError, match=message):
        GroupedQuery(**options)
