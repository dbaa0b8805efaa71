"""Decoding token by token through the cache gives what one pass over the whole sequence gives."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import (
    MLP,
    ALiBi,
    Cache,
    GatedMLP,
    GroupedQuery,
    Layer,
    Learned,
    RelativeBuckets,
    RMSNorm,
    Rotary,
    Rotary2D,
    Transformer,
    TransformerConfig,
    YarnScaling,
    multi_head,
    run_with_cache,
)

SMALL = TransformerConfig(
    layers=2, width=16, vocab=37, attention=GroupedQuery(4, 2), mlp=MLP(32), positions=Learned(32)
)
WINDOWED = (Layer(GroupedQuery(4, 2, window=3)), Layer())
CONFIGS = {
    "learned": SMALL,
    "rotary": replace(SMALL, positions=Rotary(), norm=RMSNorm(), mlp=GatedMLP(24), tied=False),
    "yarn": replace(SMALL, positions=Rotary(scaling=YarnScaling(4.0, 8))),
    "buckets": replace(SMALL, positions=RelativeBuckets(8, 16)),
    "alibi": replace(SMALL, positions=ALiBi()),
    "window": replace(SMALL, pattern=WINDOWED, positions=Rotary()),
    "query and key norms": replace(SMALL, attention=GroupedQuery(4, 2, query_key_norm=True)),
    "scanned": replace(SMALL, scan=True),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 37, (3, 10)))
# The second and third row begin with padding.
SEGMENTS = jnp.asarray((np.arange(10) >= np.array([[0], [2], [3]])).astype(np.int32))
POSITIONS = jnp.maximum(jnp.cumsum(SEGMENTS, 1) - 1, 0)


def decoded(model, params, prompt: int, joined: bool | None = None) -> jax.Array:
    """Logits `[B, T, V]` from a prompt of that many columns and then one token at a time."""
    step = jax.jit(lambda cache, token: model.apply(params, token, cache=cache))
    logits, cache = jax.jit(
        lambda tokens, segments: model.apply(
            params, tokens, segments=segments, cache=Cache.empty(len(tokens), 12, joined=joined)
        )
    )(TOKENS[:, :prompt], SEGMENTS[:, :prompt])
    parts = [logits]
    for column in range(prompt, TOKENS.shape[1]):
        logits, cache = step(cache, TOKENS[:, column : column + 1])
        parts.append(logits)
    assert int(cache.length) == TOKENS.shape[1]
    return jnp.concatenate(parts, 1)


@pytest.mark.parametrize("name, joined", [*((name, True) for name in CONFIGS), ("window", False)])
def test_decoding_gives_the_logits_of_one_pass(name, joined, random_parameters):
    model = Transformer(CONFIGS[name])
    params = random_parameters(model, TOKENS)
    whole = model.apply(params, TOKENS, segments=SEGMENTS, positions=POSITIONS)
    real = np.asarray(SEGMENTS) > 0
    np.testing.assert_allclose(decoded(model, params, 5, joined)[real], whole[real], rtol=2e-5, atol=2e-5)


def test_padding_of_the_prompt_changes_nothing(random_parameters):
    model = Transformer(CONFIGS["rotary"])
    params = random_parameters(model, TOKENS)
    alone = model.apply(params, TOKENS[1:2, 2:])
    np.testing.assert_allclose(decoded(model, params, 4)[1:2, 2:], alone, rtol=2e-5, atol=2e-5)


def test_an_encoder_decoder_keeps_what_its_encoder_said(random_parameters):
    config = replace(SMALL, kind="encoder-decoder", decoder_layers=3, positions=RelativeBuckets(8, 16))
    model = Transformer(config)
    target = TOKENS[:, ::-1]
    params = random_parameters(model, TOKENS, decoder_tokens=target)
    assert sum(name.startswith("layers_") for name in params["decoder"]) == 3
    whole = model.apply(params, TOKENS, segments=SEGMENTS, decoder_tokens=target)
    logits, cache = model.apply(
        params, TOKENS, segments=SEGMENTS, decoder_tokens=target[:, :1], cache=Cache.empty(3, 12)
    )
    parts = [logits]
    for column in range(1, 10):
        token = target[:, column : column + 1]
        logits, cache = model.apply(params, None, decoder_tokens=token, cache=cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=2e-5, atol=2e-5)


def test_only_the_last_column_reaches_the_head(random_parameters):
    model = Transformer(SMALL)
    params = random_parameters(model, TOKENS)
    last = model.apply(params, TOKENS, last=True)
    np.testing.assert_allclose(last, model.apply(params, TOKENS)[:, -1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("joined", [True, False])
def test_rows_can_be_reordered_and_repeated(joined, random_parameters):
    model = Transformer(SMALL)
    params = random_parameters(model, TOKENS)
    _, cache = model.apply(params, TOKENS[:, :4], cache=Cache.empty(3, 8, joined=joined))
    order = jnp.array([2, 0, 0, 1])
    logits, _ = model.apply(params, TOKENS[order, 4:5], cache=cache.rows(order))
    plain, _ = model.apply(params, TOKENS[:, 4:5], cache=cache)
    np.testing.assert_allclose(logits, plain[order], rtol=1e-6, atol=1e-6)
    assert cache.repeat(2).segments.shape == (6, 8)


def test_activations_can_be_read_while_decoding(random_parameters):
    model = Transformer(SMALL)
    params = random_parameters(model, TOKENS)
    (logits, cache), seen = run_with_cache(
        model, params, TOKENS[:, :4], cache=Cache.empty(3, 8), names=["mlp/act"]
    )
    assert seen["layers_1/mlp/act"].shape == (3, 4, 32)
    assert cache.entries["layers_1"]["attention"]["entries"].keys.shape == (3, 8, 2, 4)
    assert logits.shape == (3, 4, 37)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Cache.empty(1, 0), "capacity=0"),
        (lambda: _run(SMALL, Cache.empty(3, 4)), "10 tokens do not fit a cache of capacity 4"),
        (lambda: jax.jit(lambda c: _run(SMALL, c))(Cache.empty(3, 4)), "10 tokens do not fit a cache"),
        (lambda: _run(replace(SMALL, kind="encoder"), Cache.empty(3, 16)), "encoder sees its whole input"),
    ],
)
def test_impossible_caches_are_errors(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_rows_of_one_input_exchange_all_but_what_they_keep_of_it(random_parameters):
    model = Transformer(replace(SMALL, kind="encoder-decoder", positions=Rotary()))
    params = random_parameters(model, TOKENS, decoder_tokens=TOKENS)
    _, cache = model.apply(params, TOKENS, decoder_tokens=TOKENS[:, :4], cache=Cache.empty(3, 8))
    order = jnp.array([2, 0, 0])
    exchanged, taken = cache.exchanged(order), cache.rows(order)
    for path, entry in jax.tree_util.tree_leaves_with_path(exchanged.entries):
        of = cache if "cross_attention" in jax.tree_util.keystr(path) else taken
        assert any(np.array_equal(entry, each) for each in jax.tree.leaves(of.entries))
        if of is cache:
            assert any(entry is each for each in jax.tree.leaves(cache.entries))
    np.testing.assert_array_equal(exchanged.segments, taken.segments)
    assert exchanged.memory_segments is cache.memory_segments


def test_a_full_cache_takes_no_more_tokens(random_parameters):
    model = Transformer(SMALL)
    params = random_parameters(model, TOKENS)
    _, cache = model.apply(params, TOKENS[:, :3], cache=Cache.empty(3, 4))
    with pytest.raises(InputError, match="2 tokens after 3 do not fit a cache of capacity 4"):
        model.apply(params, TOKENS[:, :2], cache=cache)


def _run(config, cache):
    model = Transformer(config)
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    jax.eval_shape(lambda p: model.apply(p, TOKENS, cache=cache), params)


def test_multi_head_decodes_in_half_precision(random_parameters):
    config = replace(SMALL, attention=multi_head(4))
    model = Transformer(replace(config, precision=replace(config.precision, compute="bfloat16")))
    params = random_parameters(model, TOKENS)
    whole = model.apply(params, TOKENS, segments=SEGMENTS, positions=POSITIONS)
    real = np.asarray(SEGMENTS) > 0
    np.testing.assert_allclose(decoded(model, params, 5)[real], whole[real], rtol=0.05, atol=0.05)


def test_positions_of_another_kind_than_the_prompts_are_an_error():
    model = Transformer(replace(SMALL, positions=Rotary2D()))
    params = model.init(jax.random.key(0), TOKENS)
    both = jnp.stack([POSITIONS, POSITIONS], -1)
    _, cache = model.apply(params, TOKENS, positions=both, cache=Cache.empty(3, 12))
    with pytest.raises(InputError, match="give positions=") as error:
        model.apply(params, TOKENS[:, :1], cache=cache)
    assert "\n" not in str(error.value)
