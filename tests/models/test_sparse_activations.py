"""Activation functions that leave few neurons active: formulas, gradients, ties, and on a mesh."""

from dataclasses import replace
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from modicum import InputError
from modicum.models import (
    FP64,
    MLP,
    FATReLU,
    GatedMLP,
    StatisticalTopK,
    TopK,
    Transformer,
    TransformerConfig,
    multi_head,
    placement,
    run_with_cache,
)
from modicum.models.pretrained.family import their_activation
from modicum.parallel import Layout, MeshShape, make_mesh
from modicum.research.sparsity import moefy
from modicum.research.training.model_folder import load_model, save_model

pytestmark = pytest.mark.usefixtures("quick_compile")

F, K = 16, 5
CONFIG = TransformerConfig(layers=1, width=8, vocab=12, attention=multi_head(4))
TOKENS = np.arange(8).reshape(2, 4)


def rows(count=50):
    return np.random.default_rng(0).normal(size=(count, F))


def test_top_k_leaves_the_largest_and_their_gradients_alone(x64):
    x = rows()
    kept = np.sort(x, axis=1)[:, -K:]
    wanted = np.where((x >= kept[:, :1]) & (x > 0), x, 0)
    np.testing.assert_array_equal(TopK(K)(x), wanted)
    assert (np.count_nonzero(wanted, axis=1) < K).any()  # what is below 0 does not count
    slopes = jax.grad(lambda v: (TopK(K)(v) * jnp.arange(1.0, F + 1)).sum())(jnp.asarray(x))
    np.testing.assert_array_equal(slopes, (wanted > 0) * np.arange(1.0, F + 1))


def test_of_equal_values_top_k_leaves_the_first():
    x = jnp.asarray([[1, 2, 2, 0, 2, 2], [3, 3, 3, 3, 3, 3], [-1, -1, 0, -1, -1, -1]], jnp.bfloat16)
    wanted = [[0, 2, 2, 0, 2, 0], [3, 3, 3, 0, 0, 0], [0] * 6]
    np.testing.assert_array_equal(np.asarray(TopK(3)(x), float), wanted)


def test_what_is_not_a_number_stays_so():
    x = jnp.asarray([[jnp.nan, 1.0, 2.0, 3.0]])
    for function in (TopK(2), FATReLU(0.5), StatisticalTopK(2)):
        assert np.isnan(function(x)).any()


def test_statistical_top_k_is_its_formula_and_of_normal_neurons_leaves_k(x64):
    x = rows()
    threshold = x.mean(1, keepdims=True) + NormalDist().inv_cdf(1 - K / F) * x.std(1, keepdims=True)
    np.testing.assert_allclose(StatisticalTopK(K)(x), np.maximum(x - threshold, 0), atol=1e-10)
    wide = np.random.default_rng(1).normal(3.0, 2.0, size=(20, 4096))
    assert np.count_nonzero(StatisticalTopK(128)(wide), axis=1).mean() == pytest.approx(128, rel=0.05)
    check_grads(lambda v: StatisticalTopK(K)(v), (jnp.asarray(x[:2]),), 1, ("rev",))
    flat = jax.grad(lambda v: StatisticalTopK(K)(v).sum())(jnp.ones((1, F)))
    assert np.isfinite(flat).all()


def test_a_threshold_and_two_relus(x64):
    x = rows()
    np.testing.assert_array_equal(FATReLU(0.3)(x), np.where(x > 0.3, x, 0))
    config = replace(CONFIG, precision=FP64)
    model = Transformer(replace(config, mlp=GatedMLP(F, "drelu")))
    params = model.init(jax.random.key(0), TOKENS)
    _, seen = run_with_cache(model, params, TOKENS, names=["mlp_norm", "mlp/act", "mlp/mid", "mlp"])
    mlp, into = params["layers_0"]["mlp"], np.asarray(seen["layers_0/mlp_norm"])
    gate, up = (np.maximum(into @ mlp[name]["kernel"], 0) for name in ("gate", "up"))
    np.testing.assert_allclose(seen["layers_0/mlp/act"], gate, atol=1e-14)
    np.testing.assert_allclose(seen["layers_0/mlp/mid"], gate * up, atol=1e-14)
    np.testing.assert_allclose(seen["layers_0/mlp"], (gate * up) @ mlp["down"]["kernel"], atol=1e-14)


@pytest.mark.parametrize("activation", [TopK(K), StatisticalTopK(K)], ids=["exact", "statistical"])
def test_neurons_split_over_a_mesh_are_compared_all_together(activation):
    config = replace(CONFIG, mlp=MLP(F, activation), initial_std=0.5)
    model = Transformer(config)
    params = model.init(jax.random.key(0), TOKENS)

    def loss(params, tokens):
        outputs, seen = run_with_cache(model, params, tokens, names=["mlp/act"])
        return jnp.square(outputs).mean(), seen["layers_0/mlp/act"]

    (wanted, neurons), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, TOKENS)
    layout = Layout(make_mesh(MeshShape.parse("data=2,tensor=4"), jax.devices()[:8]))
    where = layout.parameters(jax.eval_shape(lambda: params), model.axes)
    assert "tensor" in str(where["layers_0"]["mlp"]["up"]["kernel"].spec)
    on_mesh = jax.jit(jax.value_and_grad(placement.placed(loss, layout), has_aux=True))
    (found, split), found_slopes = on_mesh(jax.device_put(params, where), layout.place(TOKENS))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(split) > 0, np.asarray(neurons) > 0)
    np.testing.assert_allclose(split, neurons, rtol=1e-4, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found_slopes, slopes)


def test_a_model_folder_keeps_the_choice(tmp_path):
    for choice in (
        MLP(F, TopK(K)),
        MLP(F, FATReLU(1)),
        GatedMLP(F, StatisticalTopK(K)),
        GatedMLP(F, "drelu"),
    ):
        model = Transformer(replace(CONFIG, mlp=choice))
        save_model(tmp_path / "m", model, model.init(jax.random.key(0), TOKENS))
        assert load_model(tmp_path / "m").model.config.mlp == choice


def test_what_cannot_be_is_one_line():
    for make, message in (
        (lambda: TopK(0), "k=0 must be at least 1"),
        (lambda: FATReLU(-1.0), r"threshold=-1\.0 must be at least 0"),
        (lambda: MLP(F, "drelu"), "'drelu' is for the two products of a GatedMLP; valid here: relu, relu2"),
        (lambda: TopK(9)(jnp.ones((1, 8))), "k=9 of 8 neurons; at most all"),
        (lambda: StatisticalTopK(8)(jnp.ones((1, 8))), "k=8 of 8 neurons; fewer than all"),
        (lambda: their_activation(TopK(8)), r"activation TopK\(k=8\) has no name in published checkpoints"),
    ):
        with pytest.raises(InputError, match=message):
            make()
    for choice in (MLP(F, TopK(K)), GatedMLP(F, "drelu")):
        model = Transformer(replace(CONFIG, mlp=choice))
        params = model.init(jax.random.key(0), TOKENS)
        with pytest.raises(InputError, match="cannot be cut into experts"):
            moefy(model, params, [{"tokens": TOKENS}])
