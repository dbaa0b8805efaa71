"""Half precision: what stays in float32. Dropout: what is random, and when."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum.models import (
    BF16,
    FP16,
    FP32,
    MLP,
    LayerNorm,
    RMSNorm,
    Transformer,
    TransformerConfig,
    multi_head,
    run_with_cache,
)
from modicum.models.losses import cross_entropy

pytestmark = pytest.mark.usefixtures("quick_compile")

TOKENS = np.asarray([[3, 1, 4, 1], [5, 2, 6, 0]])
CONFIG = TransformerConfig(layers=2, width=8, vocab=7, attention=multi_head(2), mlp=MLP(12))
HALF = {"bf16": BF16, "fp16": FP16}


def reductions(jaxpr, found=None):
    """(primitive, input type) of sums, maxima, exponentials and matrix products, sub-programs included."""
    found = [] if found is None else found
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("reduce_sum", "reduce_max", "exp", "rsqrt", "dot_general"):
            found.append((equation.primitive.name, equation.invars[0].aval.dtype.name))
        for value in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(value, "eqns"):  # of a loop, a call or a part that is computed again
                reductions(value, found)
    return found


@pytest.mark.parametrize("name", HALF)
def test_parameters_are_float32_and_statistics_too(name):
    precision = HALF[name]
    model = Transformer(replace(CONFIG, precision=precision))
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {"float32"}
    assert jax.eval_shape(model.apply, shapes, TOKENS).dtype == jnp.float32
    seen = reductions(jax.make_jaxpr(model.apply)(shapes, TOKENS).jaxpr)
    kinds = {kind: {dtype for each, dtype in seen if each == kind} for kind, _ in seen}
    for kind in ("reduce_sum", "reduce_max", "exp", "rsqrt"):
        assert kinds[kind] == {"float32"}, kind
    assert precision.compute in kinds["dot_general"]
    weights = {"query", "key", "value", "output", "up", "down"}
    _, hooks = jax.eval_shape(
        lambda p: run_with_cache(model, p, TOKENS, names=[f"({'|'.join(weights)})"]), shapes
    )
    assert {leaf.dtype.name for leaf in hooks.values()} == {precision.compute}


@pytest.mark.parametrize("name", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_half_precision_is_near_float32_and_its_gradients_are_float32(name, random_parameters):
    model, exact = Transformer(replace(CONFIG, precision=HALF[name])), Transformer(CONFIG)
    params = random_parameters(exact, TOKENS, std=0.3)

    def score(params, model):
        logits = model.apply(params, TOKENS)
        return cross_entropy(logits, TOKENS).mean(), logits

    run = jax.jit(jax.value_and_grad(score, has_aux=True), static_argnums=1)
    (loss, logits), gradient = run(params, model)
    (expected, reference), _ = run(params, exact)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(gradient)} == {"float32"}
    tolerance = 8 * float(jnp.finfo(HALF[name].compute).eps)
    np.testing.assert_allclose(loss, expected, rtol=tolerance)
    np.testing.assert_allclose(logits, reference, atol=tolerance * np.abs(reference).max())
    assert np.abs(logits - reference).max() > 0  # it did compute in half precision


@pytest.mark.parametrize("norm", [LayerNorm(), RMSNorm()], ids=["layer", "rms"])
def test_norms_of_large_half_precision_numbers_do_not_overflow(norm):
    x = jnp.asarray([[300.0, -280.0, 290.0, -310.0]], jnp.float16)  # squares exceed float16's 65,504
    module = norm.build(FP16, "norm")
    y = module.apply(module.init(jax.random.key(0), x), x)
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(np.abs(y), 1, atol=0.1)


def test_the_loss_of_half_precision_logits_is_taken_in_float32():
    logits = jnp.asarray([[8.0, 8.0, 8.0]], jnp.bfloat16)
    loss = cross_entropy(logits, jnp.asarray([1]))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, np.log(3), rtol=1e-6)


DROPOUTS = {"unrolled": {}, "scanned": {"scan": True}, "recomputed": {"scan": True, "remat": "full"}}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_is_random_in_training_only(name, random_parameters):
    model = Transformer(replace(CONFIG, dropout=0.5, precision=FP32, **DROPOUTS[name]))
    params = random_parameters(model, TOKENS)
    apply = jax.jit(model.apply, static_argnames="train")
    train = [apply(params, TOKENS, rng=jax.random.key(i), train=True) for i in (0, 0, 1)]
    np.testing.assert_array_equal(train[0], train[1])
    assert np.abs(train[0] - train[2]).max() > 1e-3
    evaluated = apply(params, TOKENS)
    np.testing.assert_array_equal(evaluated, apply(params, TOKENS, rng=jax.random.key(1)))
    without = Transformer(replace(model.config, dropout=0.0))
    np.testing.assert_array_equal(evaluated, jax.jit(without.apply)(params, TOKENS))


def test_scanned_layers_draw_different_dropout(random_parameters):
    """With equal parameters and no residual stream of their own, equal masks would give equal rows."""
    config = replace(CONFIG, dropout=0.5, scan=True)
    model = Transformer(config)
    params = random_parameters(model, TOKENS)
    params = {**params, "layers": jax.tree.map(np.ones_like, params["layers"])}
    names = [r"Dropout_\d+"]

    def run(params):
        return run_with_cache(model, params, TOKENS, names=names, rng=jax.random.key(0), train=True)[1]

    for path, value in jax.jit(run)(params).items():
        if path.startswith("layers/"):
            first, second = np.asarray(value) == 0
            assert first.any() and (first != second).any(), path
