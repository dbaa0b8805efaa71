"""IA3 against scaling by hand, on every kind of kernel, and its three places in the Transformer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.research.delta import IA3, attach, ia3_spec

X = np.random.default_rng(1).normal(size=(2, 5, 8)).astype(np.float32)


class General(nn.Module):
    """Kernels with two features and with two contracted axes."""

    @nn.compact
    def __call__(self, x):
        heads = nn.DenseGeneral((2, 3), name="split")(x)
        return nn.DenseGeneral(7, axis=(-2, -1), name="join")(heads)


class Time(nn.Module):
    """A kernel whose contracted axis is not the last."""

    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral(6, axis=1, name="time")(x)


def made(model, spec):
    """Tuned model, variables and parameters away from their start."""
    params = model.init(jax.random.key(0), X)["params"]
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype("f4"), params)
    tuned = attach(model, spec)
    variables = tuned.init(jax.random.key(1), params, X)
    return (
        tuned,
        jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape).astype("f4"), variables),
        params,
    )


def by_hand(params, before=1.0, between=1.0, after=1.0):
    split, join = params["split"], params["join"]
    heads = (np.einsum("bti,ihk->bthk", X * before, split["kernel"]) + split["bias"]) * between
    return (np.einsum("bthk,hko->bto", heads, join["kernel"]) + join["bias"]) * after


@pytest.mark.parametrize(
    ("site", "on", "shape", "place"),
    [
        ("split", "input", (8,), "before"),
        ("split", "output", (2, 3), "between"),
        ("join", "input", (2, 3), "between"),
        ("join", "output", (7,), "after"),
    ],
)
def test_scales_what_it_says_and_merges_exactly(site, on, shape, place):
    tuned, variables, params = made(General(), {site: IA3(on)})
    scale = variables["delta"][site]["~ia3"]["scale"]
    assert scale.shape == (np.prod(shape),)
    wanted = by_hand(params, **{place: np.asarray(scale).reshape(shape)})
    atol = 1e-6 * np.abs(wanted).max()
    np.testing.assert_allclose(tuned.apply(variables, params, X), wanted, atol=atol)
    merged = tuned.merge(params, variables)
    np.testing.assert_allclose(tuned.model.apply(merged, X), wanted, atol=atol)
    for got, was in zip(jax.tree.leaves(tuned.unmerge(merged, variables)), jax.tree.leaves(params)):
        np.testing.assert_allclose(got, was, rtol=1e-5)


@pytest.mark.parametrize(("on", "size"), [("input", 5), ("output", 6)])
def test_the_contracted_axis_may_be_any(on, size):
    tuned, variables, params = made(Time(), {"time": IA3(on)})
    scale = variables["delta"]["time"]["~ia3"]["scale"]
    assert scale.shape == (size,)
    time = params["time"]
    x = X * np.asarray(scale)[:, None] if on == "input" else X
    wanted = np.einsum("bti,to->bio", x, time["kernel"]) + time["bias"]
    wanted = wanted * scale if on == "output" else wanted
    np.testing.assert_allclose(tuned.apply(variables, params, X), wanted, atol=1e-5)
    np.testing.assert_allclose(tuned.model.apply(tuned.merge(params, variables), X), wanted, atol=1e-5)


def test_the_papers_places_in_a_transformer(decoder, tokens):
    model = decoder(layers=2)
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    tuned = attach(model, ia3_spec())
    variables = tuned.init(jax.random.key(1), params, tokens)
    shapes = jax.tree.map(jnp.shape, variables["delta"]["layers_1"])
    assert shapes == {
        "attention": {"key": {"~ia3": {"scale": (8,)}}, "value": {"~ia3": {"scale": (8,)}}},
        "mlp": {"down": {"~ia3_1": {"scale": (64,)}}},
    }
    np.testing.assert_array_equal(tuned.apply(variables, params, tokens), model.apply(params, tokens))


def test_neurons_are_the_hooks_output_too(decoder, tokens):
    """At a hook, which has no parameters, it computes what it does at the next layer's input."""
    model = decoder(layers=2)
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    scale = np.random.default_rng(3).normal(size=64).astype("f4")
    outputs = []
    for address, method in (("mlp/act", IA3()), ("mlp/down", IA3("input"))):
        tuned = attach(model, {address: method})
        variables = jax.tree.map(lambda leaf: leaf * scale, tuned.init(jax.random.key(1), params, tokens))
        outputs.append(tuned.apply(variables, params, tokens))
    np.testing.assert_allclose(*outputs, atol=1e-6)
    with pytest.raises(InputError, match="layers_0/mlp/act: IA3 cannot be merged into a module without"):
        attached = attach(model, {"mlp/act": IA3()})
        attached.merge(params, attached.init(jax.random.key(1), params, tokens))


def test_errors():
    with pytest.raises(InputError, match="IA3 on='both' is not one of output, input"):
        IA3("both")
    tuned, variables, params = made(General(), {"join": IA3()})
    dead = jax.tree.map(lambda leaf: leaf.at[0].set(0.0), variables)
    with pytest.raises(InputError, match="join: an IA3 factor is 0, so its merge cannot be undone"):
        tuned.unmerge(tuned.merge(params, dead), dead)
