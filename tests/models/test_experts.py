"""Routed experts: equal to each token by itself, on one device and on meshes; what is sown and counted."""

import re
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import FP64, RoutedMLP, Transformer, TransformerConfig, multi_head, preset
from modicum.models.costs import (
    active_parameter_count,
    matrix_weights,
    parameter_count,
    training_flops_per_token,
)
from modicum.models.dispatch import ExpertAxes, ExpertWeights, routed
from modicum.models.grouped import (
    _ragged_outer,
    _ragged_product,
    _tiled_outer,
    _tiled_product,
    grouped_product,
)
from modicum.models.routing import RoutingSums, choose, routing_losses, routing_sums
from modicum.parallel import MeshShape, make_mesh

pytestmark = pytest.mark.usefixtures("quick_compile")

B, T, D, F, E, K = 8, 4, 6, 10, 4, 2
CONFIG = TransformerConfig(
    layers=2, width=D, vocab=16, attention=multi_head(2), mlp=RoutedMLP(E, K, F), scan=True
)


def example():
    """x, experts, weights and kernels; one expert is chosen by nobody and one by every token."""
    rng = np.random.default_rng(0)
    order = np.argsort(rng.random((B, T, E - 2)), -1) + 1
    experts = np.concatenate([np.full((B, T, 1), E - 1), order[..., : K - 1]], -1)
    assert 0 not in experts
    arrays = [rng.normal(size=s) for s in ((B, T, D), (B, T, K), (E, D, F), (E, F, D), (E, D, F))]
    return jnp.asarray(experts), [jnp.asarray(array, jnp.float64) for array in arrays]


def token_by_token(experts, x, weights, up, down, gate):
    """The definition: each token through each of its choices, one after the other."""

    def one(token):
        x, weights, experts = token
        through = [(jax.nn.silu(x @ gate[e]) * (x @ up[e])) @ down[e] for e in experts]
        return sum(weight * y for weight, y in zip(weights, through))

    flat = jax.tree.map(lambda a: a.reshape(B * T, -1), (x, weights, experts))
    return jax.lax.map(one, flat).reshape(B, T, D)


def scalar(function, experts):
    def value(*arrays):
        return jnp.sin(function(experts, *arrays)).sum()

    return jax.jit(jax.value_and_grad(value, argnums=range(5)))


def on_mesh(mesh):
    axes = None
    if mesh:
        axes = ExpertAxes(
            make_mesh(MeshShape.parse(mesh)),
            ("data", "fsdp", "expert"),
            ("context",),
            ("expert",),
            ("tensor",),
        )

    def compute(experts, x, weights, up, down, gate):
        return routed(x, experts, weights, ExpertWeights(up, down, gate), "silu", axes)

    return compute


@pytest.fixture(scope="module")
def expected():
    with jax.enable_x64(True):
        experts, arrays = example()
        return scalar(token_by_token, experts)(*arrays)


@pytest.mark.parametrize(
    "mesh", ["", "expert=4,data=2", "expert=2,tensor=2,fsdp=2", "expert=2,context=2,data=2"]
)
def test_experts_are_the_loop_over_tokens_and_so_are_their_gradients(mesh, expected, x64):
    experts, arrays = example()
    compiled = scalar(on_mesh(mesh), experts).lower(*arrays).compile()
    found = compiled(*arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10, rtol=1e-10), found, expected)
    # Gathered: x, choices and weights, again in the backward pass of x alone what reduce-scatter was forward.
    text = compiled.as_text()
    counts = {
        kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in ("all-gather", "reduce-scatter")
    }
    if "expert" in mesh:
        assert counts == {"all-gather": 4, "reduce-scatter": 3}
        assert not re.search(r" all-to-all\(", text)
    else:
        assert counts == {"all-gather": 0, "reduce-scatter": 0}


def test_grouped_products_are_the_products_of_each_group(x64):
    rng = np.random.default_rng(1)
    rows, kernels, slope = (jnp.asarray(rng.normal(size=s)) for s in ((300, 3), (4, 3, 5), (300, 5)))
    sizes = jnp.asarray([130, 0, 129, 20])  # tiles of 128: more, none, one more, less; 21 rows of no group
    group = np.repeat(np.arange(5), [130, 0, 129, 20, 21])
    own = (group[:, None] == np.arange(4)).astype(float)
    want = jnp.einsum("nd,edf,ne->nf", rows, kernels, own)
    outer = jnp.einsum("nd,nf,ne->edf", rows, slope, own)
    for product in (grouped_product, _tiled_product, _ragged_product):
        np.testing.assert_allclose(product(rows, kernels, sizes), want, atol=1e-12)
    for product in (_tiled_outer, _ragged_outer):
        np.testing.assert_allclose(product(rows, slope, sizes), outer, atol=1e-12)


def test_the_weights_of_the_chosen():
    logits = jnp.log(jnp.asarray([0.1, 0.4, 0.2, 0.3]))
    experts, weights = choose(logits, 2, normalised=False)
    assert experts.tolist() == [1, 3]
    np.testing.assert_allclose(weights, [0.4, 0.3], rtol=1e-6)
    np.testing.assert_allclose(choose(logits, 2, normalised=True)[1], [4 / 7, 3 / 7], rtol=1e-6)


def test_the_losses_by_hand_and_their_parts_add_up():
    logits = jnp.log(jnp.asarray([[[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]]])) + 2.0
    sums = routing_sums(logits, choose(logits, 1, True)[0], balance=0.5, z_loss=0.25)
    found = routing_losses({"mlp": {"sums": sums}})
    # All choose expert 0: E Σ f P = 3 · 0.65; the log-partition function is 2.
    np.testing.assert_allclose(found["routing_loss"], 0.5 * 3 * 0.65 + 0.25 * 4.0, rtol=1e-6)
    assert found["busiest_expert"] == 3.0
    halves = [routing_sums(logits[:, i : i + 1], jnp.zeros((1, 1, 1), int), 0.5, 0.25) for i in (0, 1)]
    jax.tree.map(np.testing.assert_allclose, jax.tree.map(jnp.add, *halves), sums)
    even = RoutingSums(jnp.full(3, 2.0), jnp.full(3, 2.0), jnp.zeros(()), jnp.asarray(6.0), 1.0, 0.0)
    np.testing.assert_allclose(routing_losses([even])["routing_loss"], 1.0, rtol=1e-6)  # the least there is


@pytest.mark.parametrize("scan", [False, True])
def test_every_layer_sows_its_sums(scan):
    model = Transformer(replace(CONFIG, scan=scan))
    tokens = jnp.arange(B * T).reshape(B, T) % 16

    @jax.jit
    def sown(rng):
        params = model.init(rng, tokens)
        return params, model.apply(params, tokens, mutable=["routing"])[1]

    params, state = sown(jax.random.key(0))
    assert "routing" not in params
    loads = [node.load for node in jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, RoutingSums))]
    assert [load.shape for load in loads] == ([(2, E)] if scan else [(E,), (E,)])
    assert sum(load.sum() for load in loads) == 2 * B * T * K


def test_bf16_keeps_the_router_in_float32():
    config = replace(CONFIG, precision=replace(FP64, param="float32", compute="bfloat16", output="float32"))
    seen = {}

    def look(call, args, kwargs, context):
        value = call(*args, **kwargs)
        if context.module.name in ("router", "experts"):
            seen[context.module.name] = value.dtype
        return value

    model = Transformer(config)
    with nn.intercept_methods(look):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    assert seen == {"router": jnp.float32, "experts": jnp.bfloat16}


def test_what_a_routed_model_costs():
    mixtral = Transformer(preset("mixtral-8x7b"))
    assert parameter_count(mixtral) == 46_702_792_704  # mistralai/Mixtral-8x7B-v0.1, as published
    assert active_parameter_count(mixtral) == 12_879_925_248
    # As many products as a dense model has whose mlp is as wide as the chosen experts, and the router's.
    dense = replace(CONFIG, mlp=preset("modern-tiny").mlp.__class__(K * F))
    assert matrix_weights(CONFIG) == matrix_weights(dense) + 2 * D * E
    assert training_flops_per_token(CONFIG, T) - training_flops_per_token(dense, T) == 6 * 2 * D * E
    shared = replace(CONFIG, mlp=RoutedMLP(E, K, F, shared=F))
    assert parameter_count(Transformer(shared)) - parameter_count(Transformer(CONFIG)) == 2 * 3 * D * F


@pytest.mark.parametrize(
    "options, words",
    [
        ({"chosen": 9}, "chosen=9 of experts=8"),
        ({"chosen": 1}, "use normalised=False"),
        ({"experts": 0}, "experts=0"),
        ({"balance": -1.0}, "balance=-1.0"),
        ({"activation": "gulu"}, "'gulu' is unknown"),
    ],
)
def test_bad_choices_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        RoutedMLP(**options)
