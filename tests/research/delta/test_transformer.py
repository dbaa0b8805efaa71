"""Deltas on our Transformer: every assembly, scanned and not, and what tuning it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import (
    MLP,
    ClassifierHead,
    GatedMLP,
    GroupedQuery,
    Layer,
    RMSNorm,
    Transformer,
    TransformerConfig,
    run_with_cache,
    stack_layers,
)
from modicum.research.delta import Adapter, BitFit, Full, LoRA, attach, parameter_count


def randomised(variables, scale=0.1):
    leaves, structure = jax.tree.flatten(variables["delta"])
    keys = jax.random.split(jax.random.key(3), len(leaves))
    noisy = [leaf + scale * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)]
    return {**variables, "delta": jax.tree.unflatten(structure, noisy)}


def initial(model, tokens, **options):
    return jax.jit(model.init)(jax.random.key(0), tokens, **options)


@pytest.mark.parametrize("method", [LoRA(2), Adapter(2), BitFit(), Full()])
@pytest.mark.parametrize("options", [{}, {"scan": True, "remat": "full"}], ids=["unrolled", "scanned"])
def test_default_positions_start_at_the_backbone(decoder, tokens, method, options):
    model = decoder(layers=2, **options)
    params = initial(model, tokens)
    tuned = attach(model, method)
    variables = tuned.init(jax.random.key(1), params, tokens)
    base = model.apply(params, tokens)
    np.testing.assert_array_equal(tuned.apply(variables, params, tokens), base)
    variables = randomised(variables)
    moved = jax.jit(tuned.apply)(variables, params, tokens)
    assert jnp.abs(moved - base).max() > 1e-3
    if not isinstance(method, Adapter):
        merged = model.apply(tuned.merge(params, variables), tokens)
        np.testing.assert_allclose(merged, moved, rtol=0, atol=1e-6 * float(jnp.abs(moved).max()))


@pytest.mark.parametrize("address", ["attention/(query|value)", "layers_{1-2}/attention/(query|value)"])
def test_scanned_and_unrolled_agree(decoder, tokens, address):
    flat, scanned = decoder(), decoder(scan=True)
    params = initial(flat, tokens)
    outputs = []
    for model, backbone in ((flat, params), (scanned, stack_layers(params))):
        tuned = attach(model, {address: [LoRA(2), Adapter(2)]})
        variables = tuned.init(jax.random.key(1), backbone, tokens)
        # The same change to each array: unrolled and stacked trees list them in different orders.
        variables = jax.tree.map(lambda leaf: leaf + 0.1, variables)
        outputs.append(jax.jit(tuned.apply)(variables, backbone, tokens))
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)


def test_a_pattern_of_layers_is_addressed_by_layer(decoder, tokens):
    pattern = (Layer(), Layer(mlp=GatedMLP(24)))
    flat, scanned = decoder(pattern=pattern, mlp=MLP(32)), decoder(pattern=pattern, mlp=MLP(32), scan=True)
    spec = {"layers_{1-2}/mlp/up": LoRA(2), "layers_{3}/mlp": Full()}
    for model in (flat, scanned):
        params = initial(model, tokens)
        variables = attach(model, spec).init(jax.random.key(1), params, tokens)
        lora = 2 * (16 + 24) + 2 * (16 + 32)
        assert parameter_count(variables["delta"]) == lora + 3 * 16 * 24
    assert variables["delta"]["layers"]["layer_0"]["mlp"]["up"]["~lora"]["a"].shape == (1, 16, 2)


def test_encoder_decoder(decoder, tokens):
    model = decoder(kind="encoder-decoder", layers=2)
    arguments = {"decoder_tokens": tokens[:, :4]}
    params = initial(model, tokens, **arguments)
    spec = {
        "decoder/layers_{1}/cross_attention/(query|value)": LoRA(2),
        "encoder/layers_{0-1}/mlp/down": Adapter(2),
    }
    tuned = attach(model, spec)
    variables = tuned.init(jax.random.key(1), params, tokens, **arguments)
    assert set(variables["delta"]["decoder"]) == {"layers_1"}
    run = jax.jit(tuned.apply)
    base = jax.jit(model.apply)(params, tokens, **arguments)
    np.testing.assert_allclose(run(variables, params, tokens, **arguments), base, rtol=1e-6, atol=1e-6)
    assert jnp.abs(run(randomised(variables), params, tokens, **arguments) - base).max() > 1e-3


def test_a_linear_probe_and_a_classifier_beside_lora(decoder, tokens):
    model = decoder(head=ClassifierHead(3))
    segments = (tokens > 10).astype(jnp.int32)
    params = initial(model, tokens, segments=segments)
    probe = attach(model, {"classifier": Full()})
    variables = probe.init(jax.random.key(1), params, tokens, segments=segments)
    assert parameter_count(variables) == 16 * 3 + 3
    both = attach(model, {"attention/query": LoRA(2), "classifier": Full()})
    variables = randomised(both.init(jax.random.key(1), params, tokens, segments=segments))
    moved = jax.jit(both.apply)(variables, params, tokens, segments=segments)
    assert moved.shape == (2, 3)
    merged = jax.jit(model.apply)(both.merge(params, variables), tokens, segments=segments)
    np.testing.assert_allclose(merged, moved, rtol=1e-5, atol=1e-5)


def test_dropout_of_the_model_and_of_the_delta(decoder, tokens):
    model = decoder(dropout=0.1, scan=True)
    params = initial(model, tokens)
    tuned = attach(model, LoRA(2, dropout=0.2))
    variables = randomised(tuned.init(jax.random.key(1), params, tokens))
    train = jax.jit(functools.partial(tuned.apply, train=True))
    run = [train(variables, params, tokens, rng=jax.random.key(i)) for i in (1, 1, 2)]
    np.testing.assert_array_equal(run[0], run[1])
    assert jnp.abs(run[0] - run[2]).max() > 0


def test_the_count_of_cpm_ants_lora():
    """48 layers, 4096 wide, rank 8 on query and value: 6,291,456 parameters, computed on shapes alone."""

    config = TransformerConfig(layers=48, width=4096, attention=GroupedQuery(32), scan=True)
    model, tokens = Transformer(config=config), jax.ShapeDtypeStruct((1, 8), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    made = jax.eval_shape(attach(model, LoRA(8)).init, jax.random.key(0), params, tokens)
    assert parameter_count(made["delta"]) == 6_291_456


def test_bitfit_without_biases_is_an_error(decoder, tokens):

    model = decoder(attention=GroupedQuery(4, bias=False), mlp=GatedMLP(32), norm=RMSNorm())
    params = initial(model, tokens)
    with pytest.raises(InputError, match="BitFit at '': none of the"):
        attach(model, BitFit()).init(jax.random.key(1), params)


@pytest.mark.parametrize("options", [{}, {"scan": True, "remat": "full"}], ids=["unrolled", "scanned"])
def test_the_backbones_gradients_are_never_made(decoder, tokens, options):
    model = decoder(width=64, vocab=500, **options)
    params = initial(model, tokens)
    tuned = attach(model, LoRA(2))
    variables = tuned.init(jax.random.key(1), params, tokens)

    def loss(delta, params):
        return tuned.apply({"delta": delta}, params, tokens).sum()

    memory = jax.jit(jax.grad(loss)).lower(variables["delta"], params).compile().memory_analysis()
    size = 4 * parameter_count(variables["delta"])
    assert size <= memory.output_size_in_bytes <= 1.2 * size + 1024
    # The kernels' gradients alone would take 4 * 4 * 64 * 64 * 12 bytes.
    assert memory.temp_size_in_bytes < 4 * parameter_count(params)


def test_hooks_read_a_bound_model(decoder, tokens):
    """Code for plain models, hooks among it, runs on a tuned one."""
    model = decoder(layers=1)
    params = initial(model, tokens)
    tuned = attach(model, {"mlp/up": LoRA(2)})
    variables = randomised(tuned.init(jax.random.key(1), params, tokens))
    read = functools.partial(run_with_cache, names=["mlp/act"])
    outputs, cache = read(tuned.bind(variables), params, tokens)
    merged, wanted = read(model, tuned.merge(params, variables), tokens)
    np.testing.assert_allclose(outputs, merged, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(cache["layers_0/mlp/act"], wanted["layers_0/mlp/act"], rtol=1e-5, atol=1e-5)
