"""Norms by their formulas, and where the two kinds of residual connection put them."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from modicum.models import (
    FP64,
    MLP,
    LayerNorm,
    PostNorm,
    PreNorm,
    RMSNorm,
    Transformer,
    TransformerConfig,
    multi_head,
    run_with_cache,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

TOKENS = np.asarray([[3, 1, 4, 1]])
CONFIG = TransformerConfig(layers=1, width=8, vocab=5, attention=multi_head(2), mlp=MLP(8), precision=FP64)


def layer_norm(x, epsilon, scale, bias=0.0):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * scale + bias


def rms_norm(x, epsilon, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


@pytest.mark.parametrize(
    "norm, formula",
    [
        (LayerNorm(1e-3), layer_norm),
        (LayerNorm(1e-3, bias=False), layer_norm),
        (RMSNorm(1e-3), rms_norm),
    ],
    ids=["layer", "layer-no-bias", "rms"],
)
def test_a_norm_is_its_formula(norm, formula, x64):
    x = np.random.default_rng(0).normal(2, 3, (2, 5, 8))
    module = norm.build(FP64, "norm")
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    params = {name: np.random.default_rng(1).normal(size=leaf.shape) for name, leaf in shapes.items()}
    y = module.apply({"params": params}, x)
    np.testing.assert_allclose(y, formula(x, 1e-3, **params), rtol=0, atol=1e-13)


def sites(residual, random_parameters):
    model = Transformer(replace(CONFIG, residual=residual))
    params = random_parameters(model, TOKENS)
    names = ["embedded", "layers_0/.*", "final_norm"] if residual.final_norm else ["embedded", "layers_0/.*"]
    _, seen = jax.jit(lambda params: run_with_cache(model, params, TOKENS, names=names))(params)
    return params, {path.removeprefix("layers_0/"): value for path, value in seen.items()}


def norm_of(params, name, x):
    return layer_norm(np.asarray(x), 1e-5, **params["layers_0"][name])


def test_pre_norm_normalises_what_the_sublayer_reads(random_parameters, x64):
    params, seen = sites(PreNorm(), random_parameters)
    x = seen["embedded"]
    np.testing.assert_allclose(seen["attention_norm"], norm_of(params, "attention_norm", x), atol=1e-12)
    np.testing.assert_allclose(seen["middle"], x + seen["attention"], atol=1e-12)
    np.testing.assert_allclose(seen["mlp_norm"], norm_of(params, "mlp_norm", seen["middle"]), atol=1e-12)
    np.testing.assert_allclose(seen["residual"], seen["middle"] + seen["mlp"], atol=1e-12)
    final = layer_norm(np.asarray(seen["residual"]), 1e-5, **params["final_norm"])
    np.testing.assert_allclose(seen["final_norm"], final, atol=1e-12)


def test_post_norm_normalises_the_sum(random_parameters, x64):
    params, seen = sites(PostNorm(), random_parameters)
    assert "final_norm" not in params
    middle = norm_of(params, "attention_norm", seen["embedded"] + seen["attention"])
    np.testing.assert_allclose(seen["middle"], middle, atol=1e-12)
    residual = norm_of(params, "mlp_norm", middle + seen["mlp"])
    np.testing.assert_allclose(seen["residual"], residual, atol=1e-12)


def test_the_embedding_norm_stands_before_the_layers(random_parameters, x64):
    model = Transformer(replace(CONFIG, embedding_norm=True))
    params = random_parameters(model, TOKENS)
    _, seen = jax.jit(lambda params: run_with_cache(model, params, TOKENS, names=["embedded"]))(params)
    x = params["embedding"]["table"][TOKENS] + params["position_embedding"]["table"][:4]
    np.testing.assert_allclose(seen["embedded"], layer_norm(x, 1e-5, **params["embedding_norm"]), atol=1e-12)
