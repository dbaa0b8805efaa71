"""Merging that checks itself: non-finite numbers, lost bits, shardings."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from modicum import InputError
from modicum.models import GroupedQuery, Transformer, TransformerConfig
from modicum.parallel import Layout, MeshShape, make_mesh
from modicum.research.delta import (
    Adapter,
    BitFit,
    Full,
    LoRA,
    RandomSubset,
    attach,
    attach_leaves,
    lost_in_merge,
    safe_merge,
)

KERNEL = "layers_1/attention/query/kernel"


@pytest.fixture(scope="module")
def case(quick_compile):
    """A decoder with LoRA at query and value, moved away from its start."""
    model = Transformer(TransformerConfig(layers=2, width=16, vocab=50, attention=GroupedQuery(4)))
    tokens = jax.random.randint(jax.random.key(5), (2, 6), 0, 50)
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    tuned = attach(model, {"attention/(query|value)": LoRA(2), "mlp/up": BitFit()})
    variables = tuned.init(jax.random.key(1), params, tokens)
    variables["delta"] = jax.tree.map(lambda leaf: leaf + 0.1, variables["delta"])
    return model, tokens, params, tuned, variables


def half(params):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)


def shrunk(variables, factor):
    return {**variables, "delta": jax.tree.map(lambda leaf: leaf * factor, variables["delta"])}


def test_single_precision_merges_as_merge_does(case):
    model, tokens, params, tuned, variables = case
    merged = safe_merge(tuned, params, variables)
    jax.tree.map(np.testing.assert_array_equal, merged, tuned.merge(params, variables))
    outputs = jax.jit(tuned.apply)(variables, params, tokens)
    np.testing.assert_allclose(jax.jit(model.apply)(merged, tokens), outputs, rtol=1e-5, atol=1e-5)
    assert set(lost_in_merge(tuned, params, variables).values()) == {0.0}


def test_lost_bits_are_an_error_that_says_how_many(case):
    """Against a computation by hand in NumPy: the figure is that of the array's update."""
    _, _, params, tuned, variables = case
    params, small = half(params), shrunk(variables, 0.03)
    figures = lost_in_merge(tuned, params, small)
    own = small["delta"]["layers_1"]["attention"]["query"]["~lora"]
    old = np.asarray(params["layers_1"]["attention"]["query"]["kernel"], np.float32)
    update = 8 * np.asarray(own["a"] @ own["b"], np.float32)
    kept = np.asarray(jnp.asarray(old + update, jnp.bfloat16), np.float32) - old
    by_hand = np.linalg.norm(update - kept) / np.linalg.norm(update)
    assert 0.05 < by_hand < 1
    np.testing.assert_allclose(figures[KERNEL], by_hand, rtol=1e-3)
    with pytest.raises(InputError) as error:
        safe_merge(tuned, params, small)
    path, figure = re.match(
        r"(\S+): rounding the sum to bfloat16 loses (\S+) of the update", str(error.value)
    ).groups()
    assert float(figure) == pytest.approx(figures[path], rel=0.05)
    assert "lost=0.05; merge into float32 parameters, or allow it by lost=1.0" in str(error.value)


def test_lost_bits_can_be_allowed(case):
    _, _, params, tuned, variables = case
    params = half(params)
    merged = safe_merge(tuned, params, shrunk(variables, 0.03), lost=1.0)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(merged))
    # Large updates fit: nothing is thrown away that matters.
    assert max(lost_in_merge(tuned, params, shrunk(variables, 10)).values()) < 0.05
    safe_merge(tuned, params, shrunk(variables, 10))


def test_a_sum_is_rounded_once():
    """Two deltas at one array, each too small for bfloat16 alone: their sum is not."""
    tuned = attach_leaves(lambda params: params["bias"], {"bias": [BitFit(), BitFit()]})
    params = {"bias": jnp.ones(4, jnp.bfloat16)}
    variables = tuned.init(jax.random.key(0), params)
    step = 2.0**-8  # half of the last bit of 1 in bfloat16
    variables["delta"] = jax.tree.map(lambda leaf: leaf + step, variables["delta"])
    np.testing.assert_array_equal(safe_merge(tuned, params, variables)["bias"], 1 + 2 * step)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_numbers_name_their_array(case, value):
    _, _, params, tuned, variables = case
    broken = jax.tree.map(jnp.copy, variables)
    own = broken["delta"]["layers_1"]["attention"]["query"]["~lora"]
    own["b"] = own["b"].at[0, 3].set(value)
    with pytest.raises(InputError, match=f"{KERNEL}: 16 of its 256 merged numbers are not finite"):
        safe_merge(tuned, params, broken)


def test_overflow_of_half_precision_is_not_finite():
    tuned = attach_leaves(lambda params: params["w"], {"w": Full()})
    params = {"w": jnp.ones(3, jnp.float16)}
    variables = {"delta": {"w": {"~full": {"value": jnp.array([1.0, 1e5, 2.0])}}}}
    with pytest.raises(InputError, match=r"w: 1 of its 3 merged .* not finite.*large for float16"):
        safe_merge(tuned, params, variables, lost=1.0)


def test_what_cannot_be_merged_says_so(case):
    model, tokens, params, _, _ = case
    tuned = attach(model, {"mlp/down": Adapter(2)})
    variables = tuned.init(jax.random.key(1), params, tokens)
    with pytest.raises(InputError, match="layers_0/mlp/down: Adapter cannot be merged"):
        safe_merge(tuned, params, variables)


def test_sharded_parameters_stay_where_they_lie(case):
    model, _, params, tuned, variables = case
    layout = Layout(make_mesh(MeshShape.parse("fsdp=4,tensor=2")), zero=3, minimum=0)
    placed = jax.device_put(params, layout.parameters(params, model.axes))
    merged = safe_merge(tuned, placed, variables)
    for new, old in zip(jax.tree.leaves(merged), jax.tree.leaves(placed)):
        assert new.sharding == old.sharding
    kernel = merged["layers_1"]["attention"]["query"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec("fsdp", "tensor")
    wanted = tuned.merge(params, variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), merged, wanted)


def test_lists_and_names_with_slashes_are_checked_and_keep_their_form():
    """As Haiku names modules, and as plain JAX code keeps layers."""
    weights = jnp.full((4, 4), 1.0, jnp.bfloat16)
    params = {"layers": [{"w": weights}, (weights,)], "mlp/~/linear": {"w": weights}}
    tuned = attach_leaves(lambda params, x: x, {"": RandomSubset(0.5)})
    start = tuned.init(jax.random.key(0), params)
    variables = {**start, "delta": jax.tree.map(lambda leaf: leaf + 1e-3, start["delta"])}
    lost = lost_in_merge(tuned, params, variables)
    assert lost == {"layers/0/w": 1.0, "layers/1/0": 1.0, "mlp/~/linear/w": 1.0}
    with pytest.raises(InputError, match="layers/0/w: rounding the sum to bfloat16 loses 1 of the update"):
        safe_merge(tuned, params, variables)
    merged = safe_merge(tuned, params, variables, lost=1.0)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
