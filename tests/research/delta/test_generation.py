"""Text from tuned models: with caches, beams and streams, without merging and without compiling anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import MLP, GatedMLP, GroupedQuery, Layer, Transformer, TransformerConfig, stack_layers
from modicum.models.generation import GREEDY, beam_search, generate, stream
from modicum.models.generation.steps import decode, prefill
from modicum.models.precision import FP64
from modicum.research.delta import (
    IA3,
    Adapter,
    BitFit,
    Full,
    LoRA,
    Prefix,
    RandomSubset,
    as_transformer,
    attach,
    stack_delta,
    unstack_delta,
)

PROMPTS = [[5, 9, 3, 22], [7, 1], [30, 2, 2, 17, 40, 8]]
NEW = 6


@pytest.fixture(scope="module", autouse=True)
def in_double_precision(quick_compile):
    """No two tokens are as likely as each other by rounding."""
    with jax.enable_x64(True):
        yield


def decoder(**options):
    given = {"layers": 2, "width": 16, "vocab": 50, "attention": GroupedQuery(4, 2), "precision": FP64}
    return Transformer(TransformerConfig(**{**given, **options}))


def case(spec, model=None, seed=0, **inputs):
    """A tuned model away from its start, its variables and the backbone."""
    model = model or decoder()
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens, **inputs)
    # Embeddings that differ enough for the text to depend on everything.
    params = jax.tree.map(lambda leaf: leaf * 3, params)
    tuned = attach(model, spec)
    variables = tuned.init(jax.random.key(1), params, tokens, **inputs)
    return tuned, moved(variables, seed), params


def moved(variables, seed):
    leaves, structure = jax.tree.flatten(variables["delta"])
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [leaf + 0.5 * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves)]
    return {**variables, "delta": jax.tree.unflatten(structure, noisy)}


def rows(generated):
    return [row.tolist() for row in generated.rows()]


MERGEABLE = {"attention/(query|value)": LoRA(2), "mlp/up": [IA3(), BitFit()], "final_norm": Full()}


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_text_is_that_of_the_merged_model(scan):
    tuned, variables, params = case(MERGEABLE, decoder(scan=scan))
    model, whole = as_transformer(tuned, variables, params)
    found = rows(generate(model, whole, PROMPTS, max_new_tokens=NEW))
    merged = tuned.merge(params, variables)
    assert found == rows(generate(tuned.model, merged, PROMPTS, max_new_tokens=NEW))
    assert found != rows(generate(tuned.model, params, PROMPTS, max_new_tokens=NEW))


@pytest.mark.parametrize(
    "spec", [{"attention": Adapter(4), "mlp/down": Adapter(4)}, Prefix(3)], ids=["adapter", "prefix"]
)
def test_text_of_what_cannot_be_merged(spec):
    """Against the tuned model run on the whole text for each token, without a cache."""
    tuned, variables, params = case(spec)
    model, whole = as_transformer(tuned, variables, params)
    found = rows(generate(model, whole, PROMPTS[:1], max_new_tokens=NEW))[0]
    text, run = list(PROMPTS[0]), jax.jit(tuned.apply)
    width = len(text) + NEW
    for _ in range(NEW):
        tokens = jnp.array([text + [0] * (width - len(text))])
        segments = (jnp.arange(width)[None] < len(text)).astype(jnp.int32)
        text.append(int(run(variables, params, tokens, segments=segments)[0, len(text) - 1].argmax()))
    assert found == text[len(PROMPTS[0]) :]
    assert found != rows(generate(tuned.model, params, PROMPTS[:1], max_new_tokens=NEW))[0]


def test_an_encoder_decoder_and_what_its_cache_holds():
    """Keys of the encoder's output are made once, by the tuned map, and then read from the cache."""
    model = decoder(kind="encoder-decoder")
    spec = {"cross_attention/(query|key|value)": LoRA(2), "mlp/down": LoRA(2)}
    tuned, variables, params = case(spec, model, decoder_tokens=jnp.zeros((1, 2), jnp.int32))
    own, whole = as_transformer(tuned, variables, params)
    options = {"max_new_tokens": NEW, "decoder_tokens": 3}
    found = rows(generate(own, whole, PROMPTS, **options))
    assert found == rows(generate(model, tuned.merge(params, variables), PROMPTS, **options))
    assert found != rows(generate(model, params, PROMPTS, **options))


def test_streams_and_beams():
    tuned, variables, params = case(MERGEABLE)
    model, whole = as_transformer(tuned, variables, params)
    merged = tuned.merge(params, variables)
    streamed = list(stream(model, whole, PROMPTS[0], max_new_tokens=NEW))
    assert streamed == rows(generate(model, whole, PROMPTS[:1], max_new_tokens=NEW))[0]
    beams = [
        beam_search(*each, PROMPTS, max_new_tokens=NEW, beams=3)
        for each in ((model, whole), (tuned.model, merged))
    ]
    np.testing.assert_array_equal(beams[0].tokens, beams[1].tokens)
    np.testing.assert_allclose(beams[0].scores, beams[1].scores, rtol=1e-6)


def test_another_task_compiles_nothing():
    tuned, variables, params = case(MERGEABLE)
    model, whole = as_transformer(tuned, variables, params)
    texts = [rows(generate(model, whole, PROMPTS, max_new_tokens=NEW, sampling=GREEDY))]
    compiled = prefill._cache_size(), decode._cache_size()
    for seed in (1, 2):
        again, other = as_transformer(tuned, moved(variables, seed), params)
        assert again == model and hash(again) == hash(model)
        texts.append(rows(generate(again, other, PROMPTS, max_new_tokens=NEW, sampling=GREEDY)))
    assert (prefill._cache_size(), decode._cache_size()) == compiled
    assert texts[0] != texts[1] != texts[2]


def test_what_is_no_transformer_does_not_generate():
    import flax.linen as nn

    tuned = attach(nn.Dense(3), {"": LoRA(1)})
    with pytest.raises(InputError, match="LinenModel is no Transformer: generating needs one"):
        as_transformer(tuned, {"delta": {}}, {})
    model, _ = as_transformer(*case(MERGEABLE))
    with pytest.raises(InputError, match="no init of its own"):
        model.init(jax.random.key(0))


PATTERN = (Layer(), Layer(mlp=GatedMLP(24)))
STACKS = {
    "plain": (
        {"attention/(query|value)": LoRA(2, dropout=0.1), "mlp/down": Adapter(2), "final_norm": Full()},
        {},
    ),
    "some layers": ({"layers_{0,2-3}/attention/query": LoRA(2), "layers_{1}/mlp": BitFit()}, {}),
    "pattern": (
        {"layers_{1-2}/mlp/up": LoRA(2), "layers_{0,3}/mlp": BitFit()},
        {"pattern": PATTERN, "mlp": MLP(32)},
    ),
}


@pytest.mark.parametrize("name", STACKS)
def test_a_scanned_models_delta_moves_to_the_unrolled_one_and_back(name):
    spec, options = STACKS[name]
    flat = decoder(layers=4, **options)
    tuned, variables, params = case(spec, flat)
    stacked_params = stack_layers(params, flat.config.period)
    scanned, stacked = stack_delta(tuned, variables, params)
    assert scanned == attach(decoder(layers=4, scan=True, **options), spec)
    expected = jax.eval_shape(scanned.init, jax.random.key(0), stacked_params, jnp.zeros((1, 4), jnp.int32))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), stacked) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected
    )
    tokens = jnp.array(PROMPTS[0])[None]
    found = jax.jit(scanned.apply)(stacked, stacked_params, tokens)
    np.testing.assert_allclose(found, jax.jit(tuned.apply)(variables, params, tokens), rtol=0, atol=1e-11)
    back, again = unstack_delta(scanned, stacked, stacked_params)
    assert back == tuned
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_what_does_not_stack():
    tuned, variables, params = case({"": RandomSubset(0.1)}, decoder(scan=True))
    with pytest.raises(InputError, match=r"RandomSubset keeps '\w+' for all layers of a stack together"):
        unstack_delta(tuned, variables, params)
    tuned, variables, params = case({"attention/query": LoRA(2)})
    del variables["delta"]["layers_0"]
    with pytest.raises(InputError, match="'attention/query' names rows 0-1 of the stack, the delta has 1"):
        stack_delta(tuned, variables, params)
