"""Prefixes against attention over concatenated keys and values with a padded mask, written out by hand."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import GroupedQuery, RelativeBuckets, Rotary, Transformer, TransformerConfig
from modicum.models.cache import Cache
from modicum.models.kernels.spans import Span
from modicum.models.positions import Learned
from modicum.models.precision import FP64
from modicum.research.delta import (
    LoRA,
    Prefix,
    ShiftPositions,
    attach,
    load_delta,
    prefix_from_words,
    save_delta,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

N, TOKENS = 3, np.random.default_rng(5).integers(0, 50, (2, 7))
SEGMENTS = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2, 2]])
KINDS = {
    "grouped query, rotary": {"attention": GroupedQuery(4, 2), "positions": Rotary()},
    "window": {"attention": GroupedQuery(4, 1, window=2), "positions": Rotary()},
    "relative bias": {"attention": GroupedQuery(4, scale=1.0), "positions": RelativeBuckets(8, 16)},
    "soft cap": {"attention": GroupedQuery(4, 2, soft_cap=1.5, scale=0.7)},
    "encoder": {"attention": GroupedQuery(4, 2, query_key_norm=True), "kind": "encoder"},
    "scan": {"attention": GroupedQuery(4, 2, implementation="chunked"), "scan": True, "layers": 2},
}


def tuned_model(method, address="attention", call=None, **options):
    """Tuned model in double precision, its variables, and parameters drawn at random."""
    config = {"layers": 1, "width": 16, "vocab": 50, "precision": FP64, "attention": GroupedQuery(4, 2)}
    model = Transformer(config=TransformerConfig(**{**config, **options}))
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS, **(call or {}))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape)), shapes)
    tuned = attach(model, method if isinstance(method, dict) else {address: method})
    return tuned, tuned.init(jax.random.key(1), params, TOKENS, **(call or {})), params


def attend_by_hand(query, key, value, mask, bias, learned, choice):
    """`[B, T, H, K]` of queries to the learned and the own keys at once, the learned ones first."""
    (batch, rows, heads, width), own = query.shape, key.shape[1]
    first = [jnp.broadcast_to(x, (batch, *x.shape)) for x in (learned["key"], learned["value"])]
    key, value = (
        jnp.repeat(jnp.concatenate([x, y], 1), heads // y.shape[2], axis=2)
        for x, y in zip(first, (key, value))
    )
    scores = jnp.einsum("bthk,bshk->bhts", query, key) * (choice.scale or width**-0.5)
    if bias is not None:
        tile = bias.tile(Span(0, rows), Span(0, own))
        scores = scores + jnp.pad(tile, ((0, 0), (0, 0), (0, 0), (N, 0)))
    if choice.soft_cap:
        scores = choice.soft_cap * jnp.tanh(scores / choice.soft_cap)
    seen = jnp.broadcast_to(mask.predicate(Span(0, rows), Span(0, own)), (batch, heads, rows, own))
    seen = jnp.pad(seen, ((0, 0), (0, 0), (0, 0), (N, 0)), constant_values=True)
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshk->bthk", weights, value)


def by_hand(tuned, variables, params, *args, **kwargs):
    """The model's output with every `attend` replaced by the oracle, layer by layer."""

    def intercept(call, given, more, context):
        if context.method_name != "attend":
            return call(*given, **more)
        path, node = context.module.scope.path, {**variables["delta"]}
        learned = context.module.scope.get_variable("params", "~prefix") if tuned.model.config.scan else None
        for part in () if learned else (*path, "~prefix"):
            node = node[part]
        return attend_by_hand(*given, learned or node, context.module.choice)

    if tuned.model.config.scan:
        layers, delta = params["layers"], variables["delta"]["layers"]["attention"]["~prefix"]
        params = {**params, "layers": {**layers, "attention": {**layers["attention"], "~prefix": delta}}}
    with nn.intercept_methods(intercept):
        return tuned.model.apply(params, *args, **kwargs)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_attention_to_more_keys(kind, x64):
    tuned, variables, params = tuned_model(Prefix(N), **KINDS[kind])

    def loss(delta, hand):
        run = functools.partial(by_hand, tuned) if hand else tuned.apply
        real = run({**variables, "delta": delta}, params, TOKENS, segments=SEGMENTS)[SEGMENTS > 0]
        return jnp.sin(real).sum(), real

    both = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    ((_, got), slope), ((_, want), oracle_slope) = (both(variables["delta"], hand) for hand in (False, True))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)
    for one, other in zip(jax.tree.leaves(slope), jax.tree.leaves(oracle_slope)):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-10)
        assert jnp.abs(one).max() > 1e-6
    plain = jax.jit(tuned.model.apply)(params, TOKENS, segments=SEGMENTS)[SEGMENTS > 0]
    assert jnp.abs(got - plain).max() > 1e-2


def test_in_cross_attention_too(x64):
    call = {"decoder_tokens": TOKENS[:, :4], "segments": SEGMENTS}
    options = {"kind": "encoder-decoder", "positions": RelativeBuckets(8, 16)}
    spec = {"(attention|cross_attention)": Prefix(N)}
    tuned, variables, params = tuned_model(spec, call=call, **options)
    assert set(variables["delta"]["decoder"]["layers_0"]) == {"attention", "cross_attention"}
    got, want = (
        tuned.apply(variables, params, TOKENS, **call),
        by_hand(tuned, variables, params, TOKENS, **call),
    )
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("positions", [Rotary(), RelativeBuckets(8, 16)], ids=["rotary", "relative bias"])
def test_decoding_with_a_cache_is_the_full_pass(joined, positions, x64):
    tuned, variables, params = tuned_model(Prefix(N), positions=positions)
    segments = np.array([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    at = np.maximum(np.cumsum(segments, 1) - 1, 0)
    step = jax.jit(tuned.apply)
    full = step(variables, params, TOKENS, segments=segments, positions=at)
    cache = Cache.empty(2, 9, joined=joined)
    out, cache = tuned.apply(variables, params, TOKENS[:, :4], segments=segments[:, :4], cache=cache)
    pieces = [out]
    for column in range(4, 7):
        out, cache = step(variables, params, TOKENS[:, column : column + 1], cache=cache)
        pieces.append(out)
    got = jnp.concatenate(pieces, 1)
    np.testing.assert_allclose(got[segments > 0], full[segments > 0], rtol=0, atol=1e-10)


def test_two_prefixes_are_one_longer_one(x64):
    two, variables, params = tuned_model({"attention": [Prefix(N), Prefix(2)]})
    joined = {"delta": {}, "delta_state": {}}
    for layer, node in variables["delta"].items():
        one, other = node["attention"]["~prefix"], node["attention"]["~prefix_1"]
        both = {name: jnp.concatenate([one[name], other[name]]) for name in one}
        joined["delta"][layer] = {"attention": {"~prefix": both}}
        joined["delta_state"][layer] = {"attention": {"~prefix": {"on": jnp.ones(())}}}
    whole = attach(two.model, {"attention": Prefix(N + 2)})
    wanted = whole.apply(joined, params, TOKENS)
    np.testing.assert_allclose(two.apply(variables, params, TOKENS), wanted, rtol=0, atol=1e-12)


def test_padding_rows_harm_nobody(x64):
    """A row of padding alone sees only the prefix: finite outputs and gradients."""
    tuned, variables, params = tuned_model(Prefix(N), attention=GroupedQuery(4, implementation="chunked"))
    segments = SEGMENTS.copy()
    segments[0] = 0

    def loss(both):
        return jnp.sin(tuned.apply({**variables, "delta": both[0]}, both[1], TOKENS, segments=segments)).sum()

    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))((variables["delta"], params))):
        assert jnp.isfinite(leaf).all()


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_the_mlp_folds_into_plain_keys_and_values(scan, x64):
    _, variables, _ = tuned_model(Prefix(N, reparameterise=5), scan=scan, layers=2)
    own = variables["delta"]["layers"] if scan else variables["delta"]["layers_1"]
    own = own["attention"]["~prefix"]
    layer = jax.tree.map(lambda leaf: leaf[1], own) if scan else own
    hidden = np.tanh(layer["embedding"] @ layer["down_kernel"] + layer["down_bias"])
    key = np.einsum("nm,mgk->ngk", hidden, layer["key_kernel"]) + layer["key_bias"]
    method, plain = Prefix(N, reparameterise=5).folded({**own, "on": jnp.ones(2 if scan else ())})
    assert method == Prefix(N)
    np.testing.assert_allclose(plain["key"][1] if scan else plain["key"], key, atol=1e-14)
    assert key.shape == (N, 2, 4)


def test_positions_may_start_after_the_prefix(x64):
    options = {"positions": Learned(12)}
    tuned, variables, params = tuned_model({"attention": Prefix(N), "": ShiftPositions(N)}, **options)
    assert variables["delta"].keys() == {"layers_0"}
    alone = attach(tuned.model, {"attention": Prefix(N)})
    own = {**variables, "delta_state": {k: v for k, v in variables["delta_state"].items() if k[0] != "~"}}
    shifted = np.broadcast_to(np.arange(7) + N, TOKENS.shape)
    wanted = jax.jit(alone.apply)(own, params, TOKENS, positions=shifted)
    run = jax.jit(tuned.apply)
    np.testing.assert_array_equal(run(variables, params, TOKENS), wanted)
    given = run(variables, params, TOKENS, positions=shifted - N)
    np.testing.assert_array_equal(given, wanted)
    out, cache = run(variables, params, TOKENS[:, :5], cache=Cache.empty(2, 7))
    rest, _ = run(variables, params, TOKENS[:, 5:], cache=cache)
    np.testing.assert_allclose(jnp.concatenate([out, rest], 1), wanted, rtol=0, atol=1e-10)
    with pytest.raises(InputError, match="sequence length 13 exceeds the model's 12 positions"):
        run(variables, params, np.tile(TOKENS, 2)[:, :10])


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_from_words_it_starts_as_these_words_in_front(scan, x64):
    spec = {"attention": Prefix(N), "": ShiftPositions(N)}
    tuned, variables, params = tuned_model(spec, positions=Rotary(), scan=scan, layers=2)
    started = prefix_from_words(tuned, variables, params, [7, 4])
    words = np.concatenate([np.broadcast_to([7, 4, 7], (2, N)), TOKENS], 1)
    wanted = jax.jit(tuned.model.apply)(params, words)[:, N:]
    got = jax.jit(tuned.apply)(started, params, TOKENS)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12)
    assert jax.tree.map(jnp.shape, started) == jax.tree.map(jnp.shape, variables)


def test_words_in_a_range_of_layers(x64):
    """Rows of a scanned stack are the layers of the unrolled one; other deltas stay."""
    spec = {"layers_{1-2}/attention": Prefix(N), "mlp/up": LoRA(2)}
    tuned, variables, params = tuned_model(spec, layers=3)
    flat = prefix_from_words(tuned, variables, params, [3, 1, 4])["delta"]
    stack = {name: params[name] for name in params if not name.startswith("layers")}
    stack["layers"] = jax.tree.map(lambda *rows: jnp.stack(rows), *(params[f"layers_{i}"] for i in range(3)))
    scanned, made, _ = tuned_model(spec, layers=3, scan=True)
    rows = prefix_from_words(scanned, made, stack, [3, 1, 4])["delta"]["layers"]
    for row, layer in enumerate(("layers_1", "layers_2")):
        for name, leaf in flat[layer]["attention"]["~prefix"].items():
            np.testing.assert_allclose(rows["attention"]["~prefix"][name][row], leaf, atol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, rows["mlp"], made["delta"]["layers"]["mlp"])


def test_two_prefixes_from_words_share_no_memory(x64):
    """Training may donate what it trains, and nothing twice."""
    tuned, variables, params = tuned_model({"attention": [Prefix(2), Prefix(2)]})
    started = prefix_from_words(tuned, variables, params, [3, 1])
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(started)]
    assert len(set(pointers)) == len(pointers)


def test_where_words_make_no_prefix(x64):
    tuned, variables, params = tuned_model(LoRA(2), "attention/query")
    with pytest.raises(InputError, match="no entry is a Prefix"):
        prefix_from_words(tuned, variables, params, [1])
    tuned, variables, params = tuned_model(Prefix(N, reparameterise=4))
    with pytest.raises(InputError, match="tokens is empty"):
        prefix_from_words(tuned, variables, params, [])
    with pytest.raises(InputError, match="tokens=-1 is not in the vocabulary of "):
        prefix_from_words(tuned, variables, params, jnp.array([1, -1]))
    with pytest.raises(InputError, match="tokens are <U5, not integers"):
        prefix_from_words(tuned, variables, params, ["great"])
    with pytest.raises(InputError, match="layers_0/attention: prefix_from_words sets plain prefixes"):
        prefix_from_words(tuned, variables, params, [1])


def test_stored_with_its_shift(tmp_path, x64):
    spec = {"attention": Prefix(N, std=0.5), "": ShiftPositions(N)}
    tuned, variables, params = tuned_model(spec, positions=Learned(12))
    save_delta(tmp_path, tuned, variables, params)
    again, found = load_delta(tmp_path, tuned.model, params)
    assert again == tuned
    assert jax.tree.map(jnp.dtype, found) == jax.tree.map(jnp.dtype, variables)
    jax.tree.map(np.testing.assert_array_equal, found, variables)


def test_errors():
    with pytest.raises(InputError, match="prefix length=0 must be at least 1"):
        Prefix(0)
    with pytest.raises(InputError, match="reparameterise=-1"):
        Prefix(2, reparameterise=-1)
