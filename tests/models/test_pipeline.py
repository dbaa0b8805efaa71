"""A Transformer whose scanned layers run in stages has the loss and the gradients that it has without."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import (
    FP64,
    GroupedQuery,
    RelativeBuckets,
    Rotary,
    RoutedMLP,
    Transformer,
    TransformerConfig,
    run_with_cache,
)
from modicum.models.placement import placed
from modicum.parallel import Layout, MeshShape, make_mesh
from modicum.parallel.pipeline import Schedule
from modicum.research.training.objectives import full_tuning, language_modelling
from modicum.research.training.routing import with_routing

pytestmark = pytest.mark.usefixtures("quick_compile")

B, T, V = 16, 8, 32
PLAIN = Schedule()
DENSE = TransformerConfig(
    layers=4,
    width=16,
    vocab=V,
    attention=GroupedQuery(4),
    positions=Rotary(),
    scan=True,
    precision=FP64,
)
ROUTED = replace(DENSE, layers=3, mlp=RoutedMLP(4, 2, 8), positions=RelativeBuckets(8, 16))


def batch():
    """Two packed documents a row, and padding at the end of most."""
    tokens = np.random.default_rng(0).integers(0, V, (B, T), dtype=np.int32)
    segments = np.tile(np.where(np.arange(T) < 5, 1, 2), (B, 1)).astype(np.int32)
    segments[3:, 6:] = 0
    return {
        "tokens": tokens,
        "targets": (tokens * 7 + 3) % V,
        "weights": (segments > 0).astype(np.float64),
        "segments": segments,
        "positions": np.tile(np.r_[0:5, 0:3], (B, 1)).astype(np.int32),
    }


def layout_of(mesh, schedule=PLAIN, layers=4, zero=0):
    layout = Layout(make_mesh(MeshShape.parse(mesh)), zero=zero, minimum=0, schedule=schedule)
    return layout.for_layers(layers)


def loss_of(config, train=True):
    loss = with_routing(language_modelling, full_tuning(Transformer(config)), config)

    def mean(params, batch):
        sums = loss(params, {}, batch, jax.random.key(1) if train else None)
        return sums.total / sums.weight, sums.metrics

    return mean


def params_of(config):
    return jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, T), jnp.int32))


CASES = [
    (replace(DENSE, remat="full"), "pipe=2,tensor=2,data=2", Schedule(4, rounds=2), 1),
    (ROUTED, "pipe=2,expert=2,fsdp=2", Schedule(), 3),  # three layers in two stages
    (DENSE, "pipe=4,context=2", Schedule(), 0),
]


@pytest.mark.parametrize(("config", "mesh", "schedule", "zero"), CASES)
def test_stages_change_nothing(config, mesh, schedule, zero, x64):
    layout, model = layout_of(mesh, schedule, config.layers, zero), Transformer(config)
    params = params_of(config)
    want = jax.jit(jax.value_and_grad(loss_of(config), has_aux=True))(params, batch())
    shardings = layout.parameters(params, model.axes)
    split = jax.device_put(params, shardings)
    step = jax.jit(
        jax.value_and_grad(placed(loss_of(config), layout), has_aux=True),
        out_shardings=((None, None), shardings),
    )
    compiled = step.lower(split, layout.place(batch())).compile()
    found = compiled(split, layout.place(batch()))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-10), found, want)
    assert len(re.findall(r" collective-permute(?:-start)?\(", compiled.as_text())) >= 4
    if config.layers % 2 == 0:  # each device has the parameters of its own layers alone
        kernel = found[1]["layers"]["mlp"]["up"]["kernel"]
        assert kernel.addressable_shards[0].data.shape[0] == config.layers // layout.mesh.shape["pipe"]


REFUSED = [
    (replace(DENSE, dropout=0.1), "dropout=0.1 would draw anew"),
    (replace(DENSE, kind="encoder-decoder"), "an encoder-decoder has two stacks"),
    (replace(DENSE, remat="full:2,none:2"), "remat='full:2,none:2' differs between layers"),
    (replace(DENSE, scan=False), "pipe splits scanned layers; add scan=True"),
]


@pytest.mark.parametrize(("config", "words"), REFUSED)
def test_what_a_pipeline_cannot_have_is_said(config, words):
    layout = layout_of("pipe=2,data=4")
    model = Transformer(replace(config, precision=TransformerConfig().precision))
    inputs = {"decoder_tokens": jnp.zeros((B, T), jnp.int32)} if config.kind == "encoder-decoder" else {}

    def forward(params, tokens):
        return model.apply(params, tokens, rng=jax.random.key(0), train=True, **inputs)

    tokens = jnp.zeros((B, T), jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, **inputs))
    with pytest.raises(InputError, match=words):
        jax.eval_shape(placed(forward, layout), params, tokens)


def test_micro_batches_that_do_not_fit_and_hooks_are_refused():
    config = replace(DENSE, precision=TransformerConfig().precision)
    model, tokens = Transformer(config), jnp.zeros((B, T), jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens))
    with pytest.raises(InputError, match="16 rows do not divide into 6 micro-batches over pipe=2"):
        jax.eval_shape(placed(model.apply, layout_of("pipe=2,data=4", Schedule(6))), params, tokens)
    look = placed(partial(run_with_cache, model, names=["mlp/act"]), layout_of("pipe=2,data=4"))
    with pytest.raises(InputError, match="only the routing's sums leave a stage"):
        jax.eval_shape(look, params, tokens)


def test_the_automatic_schedule():
    assert Schedule().parts(64, devices=4, blocks=2) == 16
    assert Schedule().parts(12, devices=2, blocks=2) == 6
    assert Schedule().parts(40, devices=4, blocks=1) == 8
    with pytest.raises(InputError, match="rounds=0"):
        Schedule(rounds=0)
