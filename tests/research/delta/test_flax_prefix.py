"""Prefixes at Flax's own attention, against attention from the parameters alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.research.delta import FlaxPrefix, LoRA, Prefix, ShiftPositions, attach

pytestmark = pytest.mark.usefixtures("quick_compile")

N = 3


class Flax(nn.Module):
    """A decoder of Flax's own attention; `attention` may come from outside, as a field."""

    heads: int = 2
    layers: int = 2
    given: nn.Module | None = None
    masked: bool = True

    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(x[..., 0]) if self.masked else None
        for _ in range(self.layers):
            x = x + nn.MultiHeadDotProductAttention(self.heads, qkv_features=12, normalize_qk=True)(
                x, mask=mask
            )
        return x if self.given is None else x + self.given(x, mask=mask)


X = np.random.default_rng(2).normal(size=(2, 5, 8))


def flax_by_hand(x, params, learned, heads, masked):
    """Causal attention to the prefix and the own keys, from the parameters alone."""
    query, key, value = (
        np.einsum("btd,dhk->bthk", x, params[name]["kernel"]) + params[name]["bias"]
        for name in ("query", "key", "value")
    )

    def normalised(y, scale):
        return (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6) * scale

    if "query_ln" in params:
        query = normalised(query, params["query_ln"]["scale"])
        key = normalised(key, params["key_ln"]["scale"])
    key, value = (
        np.concatenate([np.broadcast_to(learned[name], (len(x), *learned[name].shape)), y], 1)
        for name, y in (("key", key), ("value", value))
    )
    scores = np.einsum("bthk,bshk->bhts", query, key) / np.sqrt(query.shape[-1])
    seen = np.concatenate([np.ones((5, N), bool), np.tri(5, dtype=bool) | (not masked)], 1)
    weights = np.exp(scores) * seen
    out = np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), value)
    return np.einsum("bthk,hkd->btd", out, params["out"]["kernel"]) + params["out"]["bias"]


@pytest.mark.parametrize("masked", [True, False], ids=["causal", "no mask"])
def test_flax_attention(masked, x64):
    model = Flax(masked=masked)
    params = jax.tree.map(lambda leaf: leaf + 0.1, model.init(jax.random.key(0), X)["params"])
    tuned = attach(model, FlaxPrefix(N))
    variables = tuned.init(jax.random.key(1), params, X)
    x = X
    for name in ("MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1"):
        learned = variables["delta"][name]["~flax_prefix"]
        assert learned["key"].shape == (N, 2, 6)
        x = x + flax_by_hand(x, jax.tree.map(np.asarray, params[name]), learned, 2, masked)
    np.testing.assert_allclose(jax.jit(tuned.apply)(variables, params, X), x, rtol=0, atol=1e-10)


def test_a_users_flax_module_is_left_as_it_was(x64):
    mine = nn.MultiHeadDotProductAttention(2, qkv_features=12)
    model, before = Flax(given=mine, layers=1), mine.attention_fn
    params = model.init(jax.random.key(0), X)["params"]
    spec = {"given": [FlaxPrefix(N), FlaxPrefix(2)], "given/key": LoRA(2)}
    tuned = attach(model, spec)
    variables = tuned.init(jax.random.key(1), params, X)
    base = model.apply({"params": params}, X)
    assert jnp.abs(tuned.apply(variables, params, X) - base).max() > 1e-2
    off = {**variables, "delta_state": jax.tree.map(jnp.zeros_like, variables["delta_state"])}
    np.testing.assert_allclose(tuned.apply(off, params, X), base, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(model.apply({"params": params}, X), base)
    assert mine.attention_fn is before and model.given is mine


class Lifted(nn.Module):
    """Three layers whose attention, or whose layers, are lifted."""

    lift: str

    @nn.compact
    def __call__(self, x):
        kind = nn.MultiHeadDotProductAttention
        kind = nn.remat(kind) if self.lift == "remat" else kind

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x):
                return x + kind(2, name="mix")(x, mask=nn.make_causal_mask(x[..., 0])), None

        if self.lift == "scan":
            scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return scan(name="layers")(x)[0]
        for index in range(3):
            x = Layer(name=f"layers_{index}")(x)[0]
        return x


@pytest.mark.parametrize("lift", ["remat", "scan"])
@pytest.mark.parametrize("address", ["mix", "layers_{0,2}/mix"])
def test_flax_attention_under_lifts(address, lift, x64):
    """The same numbers as unlifted, and layers of a scan outside the address compute what they did."""

    def stacked(tree):
        if lift != "scan" or not tree:
            return tree
        return {"layers": jax.tree.map(lambda *rows: jnp.stack(rows), *tree.values())}

    plain, other = (attach(Lifted(each), {address: FlaxPrefix(N)}) for each in ("", lift))
    params = Lifted("").init(jax.random.key(0), X)["params"]
    variables = plain.init(jax.random.key(1), params, X)
    moved = {part: stacked(tree) for part, tree in variables.items()}
    wanted = jax.jit(plain.apply)(variables, params, X)
    got = jax.jit(other.apply)(moved, stacked(params), X)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12)
    made = other.init(jax.random.key(1), stacked(params), X)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, moved)


class Deaf(nn.Module):
    """Its attention function takes no mask."""

    @nn.compact
    def __call__(self, x):
        def attend(query, key, value):
            return value

        return nn.MultiHeadDotProductAttention(2, qkv_features=12, attention_fn=attend, name="deaf")(x)


def test_errors():
    params = Flax().init(jax.random.key(0), X)["params"]
    with pytest.raises(InputError, match=r"FlaxPrefix needs an nn\.MultiHeadDotProduct.*, not Dense"):
        attach(Flax(), {"query": FlaxPrefix(2)}).init(jax.random.key(1), params, X)
    with pytest.raises(InputError, match="ShiftPositions acts at the root of a Transformer"):
        attach(Flax(), ShiftPositions(2)).init(jax.random.key(1), params, X)
    params = Deaf().init(jax.random.key(0), X)["params"]
    with pytest.raises(InputError, match="deaf: a FlaxPrefix needs an attention_fn that takes mask="):
        attach(Deaf(), {"deaf": FlaxPrefix(2)}).init(jax.random.key(1), params, X)
    with pytest.raises(InputError, match="no module"):
        attach(Deaf(), Prefix(2)).init(jax.random.key(1), params, X)


def test_a_mask_that_says_the_same_of_all_keys():
    """Flax takes masks that broadcast, `[B, 1, T, 1]` for instance."""
    model = nn.MultiHeadDotProductAttention(2)
    params = model.init(jax.random.key(0), X)["params"]
    tuned = attach(model, {"": FlaxPrefix(N)})
    variables = tuned.init(jax.random.key(1), params, X)
    whole, narrow = (
        tuned.apply(variables, params, X, mask=np.ones((2, 1, 5, keys), bool), deterministic=True)
        for keys in (5, 1)
    )
    np.testing.assert_array_equal(narrow, whole)
