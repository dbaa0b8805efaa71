"""Leaf deltas: Full and BitFit, on modules and on plain functions."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from modicum import InputError
from modicum.research.delta import (
    IA3,
    BitFit,
    DiffPruning,
    Full,
    LoRA,
    attach,
    attach_leaves,
    join,
    load_delta,
    parameter_count,
    project,
    save_delta,
)
from modicum.research.delta.leaves import FunctionModel
from modicum.research.delta.tree import tree

X = jax.random.normal(jax.random.key(7), (6, 4))
PARAMS = {
    "layers": {"kernel": jax.random.normal(jax.random.key(0), (3, 4, 4)), "bias": jnp.ones((3, 4))},
    "head": {"kernel": jax.random.normal(jax.random.key(1), (4, 2)), "bias": jnp.ones(2)},
}


def network(params, x):
    """A model in plain JAX with stacked layers."""
    x, _ = jax.lax.scan(
        lambda x, layer: (jnp.tanh(x @ layer["kernel"] + layer["bias"]), None), x, params["layers"]
    )
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def moved(variables, by=0.5):
    return jax.tree.map(lambda leaf: leaf + by, variables)


@pytest.mark.parametrize("method", [Full(), BitFit()])
def test_starts_at_the_backbone_and_merges_bit_for_bit(method):
    tuned = attach_leaves(network, {"": method})
    variables = tuned.init(jax.random.key(0), PARAMS)
    np.testing.assert_array_equal(tuned.apply(variables, PARAMS, X), network(PARAMS, X))
    variables = moved(variables)
    merged = tuned.merge(PARAMS, variables)
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)
    np.testing.assert_array_equal(network(merged, X), tuned.apply(variables, PARAMS, X))
    assert jnp.abs(network(merged, X) - network(PARAMS, X)).max() > 0.1


def test_full_at_the_root_is_full_tuning():
    """Its gradient is the backbone's own."""
    tuned = attach_leaves(network, {"": Full()})
    variables = tuned.init(jax.random.key(0), PARAMS)
    ours = jax.grad(lambda v: tuned.apply(v, PARAMS, X).sum())(variables)["delta"]
    theirs = jax.grad(lambda p: network(p, X).sum())(PARAMS)
    assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == sum(
        leaf.size for leaf in jax.tree.leaves(PARAMS)
    )
    for part in ("layers", "head"):
        for name in ("kernel", "bias"):
            np.testing.assert_array_equal(ours[part][name]["~full"]["value"], theirs[part][name])


def test_an_address_names_everything_below_it():
    tuned = attach_leaves(network, {"head": Full(), "layers": BitFit()})
    delta = tuned.init(jax.random.key(0), PARAMS)["delta"]
    assert set(delta["head"]) == {"kernel", "bias"}
    assert set(delta["layers"]) == {"bias"}
    probe = attach_leaves(network, {"": Full()}, exclude=["layers", "head/bias"])
    assert jax.tree.leaves(probe.init(jax.random.key(0), PARAMS)["delta"])[0].shape == (4, 2)


@pytest.mark.parametrize("method", [Full(), BitFit()])
def test_a_layer_range_stores_and_changes_only_its_rows(method):
    tuned = attach_leaves(network, {"layers_{1-}": method})
    variables = moved(tuned.init(jax.random.key(0), PARAMS))
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(variables["delta"]))
    merged = tuned.merge(PARAMS, variables)
    np.testing.assert_array_equal(merged["layers"]["bias"][0], PARAMS["layers"]["bias"][0])
    np.testing.assert_array_equal(merged["layers"]["bias"][1:], PARAMS["layers"]["bias"][1:] + 0.5)
    np.testing.assert_array_equal(network(merged, X), tuned.apply(variables, PARAMS, X))


def test_full_owns_its_memory():
    """An optimizer step that donates the delta leaves the backbone alive."""
    tuned = attach_leaves(network, {"head": Full()})
    variables = tuned.init(jax.random.key(0), PARAMS)

    def donate(variables):
        return jax.tree.map(lambda leaf: leaf + 1, variables)

    jax.jit(donate, donate_argnums=0)(variables)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(PARAMS))
    assert np.isfinite(network(PARAMS, X)).all()


def test_bitfit_learns_below_the_steps_of_a_bfloat16_bias():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    tuned = attach_leaves(network, {"head": BitFit()})
    variables = tuned.init(jax.random.key(0), params)
    for _ in range(16):
        variables = moved(variables, 2**-10)  # each step alone is lost next to a bias of 1
    merged = tuned.merge(params, variables)["head"]["bias"]
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged.astype(jnp.float32), 1 + 2**-6)


def test_only_the_delta_trains():
    tuned = attach_leaves(network, {"head": Full(), "layers": BitFit()})
    variables = tuned.init(jax.random.key(0), PARAMS)
    optimizer = optax.adam(1e-2)
    state = optimizer.init(variables["delta"])
    target = jnp.sin(3 * X[:, :2])

    @jax.jit
    def step(delta, state):
        def loss(delta):
            return ((tuned.apply({"delta": delta}, PARAMS, X) - target) ** 2).mean()

        value, gradients = jax.value_and_grad(loss)(delta)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(delta, updates), state, value

    delta, losses = variables["delta"], []
    for _ in range(60):
        delta, state, value = step(delta, state)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]


def test_leaf_deltas_on_modules_and_beside_site_deltas():
    model = nn.Dense(3)
    params = model.init(jax.random.key(0), X)["params"]
    tuned = attach(model, {"": [LoRA(2), BitFit()], "kernel": Full()})
    variables = moved(tuned.init(jax.random.key(1), params, X), 0.25)
    delta = variables["delta"]
    kernel = delta["kernel"]["~full"]["value"] + (delta["~lora"]["a"] @ delta["~lora"]["b"]) * 8.0
    wanted = X @ kernel + params["bias"] + 0.25
    np.testing.assert_allclose(tuned.apply(variables, params, X), wanted, rtol=1e-5, atol=1e-5)
    merged = model.apply({"params": tuned.merge(params, variables)}, X)
    np.testing.assert_allclose(merged, wanted, rtol=1e-5, atol=1e-5)


def test_functions_that_take_rng_and_train_get_them():
    def noisy(params, x, rng, train):
        return x + jax.random.normal(rng, x.shape) * params["size"] if train else x

    tuned = attach_leaves(noisy, {"size": Full()})
    params = {"size": jnp.ones(())}
    variables = tuned.init(jax.random.key(0), params)
    assert jnp.abs(tuned.apply(variables, params, X, rng=jax.random.key(1), train=True) - X).max() > 0
    np.testing.assert_array_equal(tuned.apply(variables, params, X, rng=jax.random.key(1)), X)


@pytest.mark.parametrize(
    ("spec", "params", "message"),
    [
        ({"head/kernel": BitFit()}, PARAMS, "BitFit at 'head/kernel': none of the 1 arrays there fits"),
        ({"heed": Full()}, PARAMS, "'heed' names no array; near misses: head"),
        (
            {"table": Full()},
            {"table": jnp.arange(3)},
            "table: Full tunes floating-point arrays, this one is int32",
        ),
        ({"layers_{2-3}": Full()}, PARAMS, "names layer 3; the model has layers 0-2"),
    ],
)
def test_what_does_not_fit_is_an_error(spec, params, message):
    with pytest.raises(InputError, match=message) as caught:
        attach_leaves(network, spec).init(jax.random.key(0), params)
    assert "\n" not in str(caught.value)


def test_a_delta_of_another_model_is_an_error():
    tuned = attach_leaves(network, {"head": Full()})
    variables = tuned.init(jax.random.key(0), PARAMS)
    with pytest.raises(InputError, match="head/bias: the delta tunes this array, but the model has none"):
        tuned.apply(variables, {"layers": PARAMS["layers"], "head": {"kernel": PARAMS["head"]["kernel"]}}, X)
    with pytest.raises(InputError, match="the delta has '~full'; this specification has ~bitfit"):
        attach_leaves(network, {"": BitFit()}).apply(variables, PARAMS, X)
    with pytest.raises(InputError, match="does not name it"):
        attach_leaves(network, {"layers": Full()}).apply(variables, PARAMS, X)


def test_site_methods_need_modules():
    with pytest.raises(InputError, match="LoRA acts at modules"):
        attach_leaves(network, {"head": LoRA(2)})


HAIKU = {
    "mlp/~/linear_0": {"w": jnp.full((4, 3), 0.1), "b": jnp.zeros(3)},
    "mlp/~encode/linear_1": {"w": jnp.full((3, 2), 0.2), "b": jnp.zeros(2)},
}
LISTS = {"layers": [(jnp.full((4, 3), 0.1), jnp.zeros(3)), (jnp.full((3, 2), 0.2), jnp.zeros(2))]}


def of_haiku(params, x):
    for name in HAIKU:
        x = jnp.tanh(x @ params[name]["w"] + params[name]["b"])
    return x


def of_lists(params, x):
    for kernel, bias in params["layers"]:
        x = jnp.tanh(x @ kernel + bias)
    return x


TREES = {"haiku": (HAIKU, of_haiku), "lists": (LISTS, of_lists)}


@pytest.mark.parametrize(
    ("kind", "address", "paths"),
    [
        ("haiku", "linear_0/w", ["mlp/~/linear_0/w"]),
        ("haiku", "mlp/~encode", ["mlp/~encode/linear_1/w", "mlp/~encode/linear_1/b"]),
        ("haiku", "", ["mlp/~/linear_0/w", "mlp/~encode/linear_1/b"]),
        ("lists", "layers/{1}", ["layers/1/0", "layers/1/1"]),
        ("lists", "re:layers/./1", ["layers/0/1", "layers/1/1"]),
    ],
)
def test_trees_of_other_libraries(kind, address, paths, tmp_path):
    """Names with `/` and `~` as Haiku makes them, and lists and tuples: addressed, merged, stored."""
    params, function = TREES[kind]
    tuned = attach_leaves(function, {address: Full()})
    variables = moved(tuned.init(jax.random.key(0), params), 0.1)
    assert {path for path, _ in tuned.hits(variables, params)} >= set(paths)
    merged = tuned.merge(params, variables)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_array_equal(function(merged, X), tuned.apply(variables, params, X))
    assert jnp.abs(function(merged, X) - function(params, X)).max() > 1e-3
    assert tree(tuned, params, variables).trained == parameter_count(variables["delta"])
    save_delta(tmp_path, tuned, variables, params)
    again, found = load_delta(tmp_path, FunctionModel(function), params)
    np.testing.assert_array_equal(again.apply(found, params, X), tuned.apply(variables, params, X))


class Pair(NamedTuple):
    w: jax.Array
    b: jax.Array


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"linear": Pair(jnp.ones(2), jnp.ones(2))}, "parameter linear/w: a delta's addresses need nested"),
        ({1: jnp.ones(2)}, "parameter 1: a delta's addresses need nested dictionaries"),
        ({"a": {"b": jnp.ones(2)}, "a/b": jnp.zeros(2)}, "parameter a/b: .* no two arrays of one path"),
        ([jnp.ones(2)], "parameters are a dictionary of arrays, not a list"),
    ],
    ids=["named tuple", "numbers as names", "one path twice", "a list"],
)
def test_trees_without_addresses_are_refused(params, message):
    with pytest.raises(InputError, match=message):
        attach_leaves(network, {"": Full()}).init(jax.random.key(0), params)


@pytest.mark.parametrize("spec", [{"": [IA3(), BitFit()]}, {"": [BitFit(), IA3()]}], ids=["after", "before"])
def test_a_merge_is_undone_in_its_own_order(spec):
    """Arrays are merged first, whatever the specification says first: so they are undone last."""
    model = nn.Dense(3)
    params = {**model.init(jax.random.key(0), X)["params"], "bias": jnp.array([1.0, -2.0, 3.0])}
    tuned = attach(model, spec)
    variables = moved(tuned.init(jax.random.key(1), params, X))
    back = tuned.unmerge(tuned.merge(params, variables), variables)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6), back, params)


def test_another_tree_than_a_deltas_variables_is_no_delta():
    """It would act as no delta at all, and the backbone's outputs be taken for the tuned model's."""
    tuned = attach_leaves(network, {"head": DiffPruning()})
    variables = tuned.init(jax.random.key(0), PARAMS)
    delta = variables["delta"]
    for use in (
        lambda: tuned.apply(delta, PARAMS, X),
        lambda: tuned.apply(PARAMS, variables, X),
        lambda: tuned.merge(variables, PARAMS),
        lambda: tuned.unmerge(variables, PARAMS),
        lambda: tuned.penalty({}),
        lambda: tuned.penalty({"params": PARAMS, **variables}),
        lambda: project(tuned, delta, 0.5),
        lambda: join([(tuned, delta)]),
    ):
        with pytest.raises(
            InputError, match=r"a delta's variables are .* as init returns them, not"
        ) as error:
            use()
        assert "\n" not in str(error.value)
