"""LoRA's scale, its initialisations, embeddings; what holds for every method is in test_every_method.py."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.research.delta import LoRA, attach

X = jax.random.normal(jax.random.key(7), (2, 5, 12))
DENSE = nn.Dense(8)
TOKENS = np.array([[1, 4, 4], [0, 19, 7]])


class Heads(nn.Module):
    """A kernel of three axes, `[12, 2, 4]`."""

    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral((2, 4), name="split")(x)


def started(method, model=DENSE, address="", x=X):
    params = model.init(jax.random.key(0), x)["params"]
    if x.dtype == jnp.float64:
        params = jax.tree.map(lambda leaf: leaf.astype(x.dtype), params)
    tuned = attach(model, {address: method})
    return tuned, tuned.init(jax.random.key(1), params, x), params


def lora_of(variables, part="delta"):
    node = variables[part]
    while "~lora" not in node:
        (node,) = node.values()
    return {name: np.asarray(value, np.float64) for name, value in node["~lora"].items()}


@pytest.mark.parametrize(("stabilised", "scale"), [(False, 16 / 4), (True, 16 / 2)])
def test_the_scale_by_rank_and_by_its_root(stabilised, scale):
    tuned, variables, params = started(LoRA(4, 16.0, rank_stabilised=stabilised))
    variables["delta"]["~lora"]["b"] = jnp.ones((4, 8))
    added = lora_of(variables)["a"] @ np.ones((4, 8)) * scale
    merged = tuned.merge(params, variables)["kernel"]
    np.testing.assert_allclose(merged, params["kernel"] + added, rtol=1e-5, atol=1e-5)


def test_gaussian_entries_have_the_ranks_inverse_as_deviation():
    _, variables, _ = started(LoRA(16, initialisation="gaussian"), nn.Dense(64), x=jnp.ones((1, 2000)))
    start = lora_of(variables)
    np.testing.assert_allclose(start["a"].std(), 1 / 16, rtol=0.02)
    assert abs(start["a"].mean()) < 0.002 and not start["b"].any()


@pytest.mark.parametrize("model, address", [(DENSE, ""), (Heads(), "split")], ids=["Dense", "heads"])
def test_pissa_starts_at_the_largest_singular_values(model, address, x64):
    method = LoRA(3, alpha=6.0, initialisation="pissa")
    _, variables, params = started(method, model, address, X.astype(jnp.float64))
    kernel = np.asarray(jax.tree.leaves({k: v for k, v in flat(params).items() if "kernel" in k})[0])
    values = np.linalg.svd(kernel.reshape(12, 8), compute_uv=False)
    start = lora_of(variables)
    part = 2.0 * start["a"] @ start["b"]
    np.testing.assert_allclose(np.linalg.svd(part, compute_uv=False)[:3], values[:3], rtol=1e-9)
    left = kernel.reshape(12, 8) - part
    np.testing.assert_allclose(np.linalg.svd(left, compute_uv=False)[:5], values[3:], rtol=1e-9)
    # The singular values are split evenly between the factors.
    np.testing.assert_allclose(start["a"].T @ start["a"], start["b"] @ start["b"].T, atol=1e-12)
    np.testing.assert_allclose(np.diag(start["a"].T @ start["a"]), values[:3] / 2.0, rtol=1e-9)


def test_olora_starts_at_the_first_columns_of_a_qr_decomposition(x64):
    _, variables, params = started(LoRA(3, alpha=6.0, initialisation="olora"), x=X.astype(jnp.float64))
    q, r = np.linalg.qr(np.asarray(params["kernel"]).T)
    start = lora_of(variables)
    np.testing.assert_allclose(start["a"] @ start["b"], (q[:, :3] @ r[:3]).T, atol=1e-12)
    np.testing.assert_allclose(start["b"] @ start["b"].T, np.eye(3), atol=1e-12)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_only_the_change_since_the_start_is_added(start):
    method = LoRA(3, initialisation=start)
    tuned, variables, params = started(method)
    assert lora_of(variables, "delta_state").keys() == {"start_a", "start_b"}
    run = jax.jit(tuned.apply)
    np.testing.assert_array_equal(run(variables, params, X), jax.jit(tuned.model.apply)(params, X))
    np.testing.assert_array_equal(tuned.merge(params, variables)["kernel"], params["kernel"])
    # What is trained may be donated: the state has memory of its own.
    delta, state = variables["delta"]["~lora"], variables["delta_state"]["~lora"]
    assert delta["a"].unsafe_buffer_pointer() != state["start_a"].unsafe_buffer_pointer()
    before = lora_of(variables)
    delta["b"] = delta["b"] + 0.5
    change = method.scale * before["a"] @ np.full((3, 8), 0.5)
    moved = run(variables, params, X) - tuned.model.apply(params, X)
    np.testing.assert_allclose(moved, np.asarray(X) @ change, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match=r"cannot be scaled.*convert it to plain LoRA first"):
        method.scaled(delta, 2.0)


def test_dropout_spares_what_is_subtracted():
    """The rest of the kernel is no adapter: it sees all of its input, as where it is stored as weights."""
    tuned, variables, params = started(LoRA(3, dropout=0.5, initialisation="pissa"))
    still = tuned.apply(variables, params, X)
    train = tuned.apply(variables, params, X, train=True, rng=jax.random.key(3))
    start = lora_of(variables)
    rest = np.asarray(params["kernel"]) - (16 / 3) * start["a"] @ start["b"]
    dropped = np.linalg.lstsq(start["b"].T * 16 / 3, (train - X @ rest).reshape(-1, 8).T, rcond=None)[0]
    assert jnp.abs(train - still).max() > 0.1
    np.testing.assert_allclose(
        start["b"].T @ dropped * 16 / 3, (train - X @ rest).reshape(-1, 8).T, atol=1e-4
    )


@pytest.mark.parametrize("start", ["uniform", "gaussian"])
def test_an_embedding(start, x64):
    model = nn.Embed(20, 12, param_dtype=jnp.float64)
    tuned, variables, params = started(LoRA(4, initialisation=start), model, x=TOKENS)
    delta = variables["delta"]["~lora"]
    assert delta["a"].shape == (20, 4) and not delta["a"].any()
    assert 0.5 < delta["b"].std() < 1.5
    base = tuned.model.apply(params, TOKENS)
    np.testing.assert_array_equal(tuned.apply(variables, params, TOKENS), base)
    delta["a"] = jax.random.normal(jax.random.key(4), (20, 4))
    moved = tuned.apply(variables, params, TOKENS)
    np.testing.assert_allclose(moved - base, (delta["a"] @ delta["b"] * 4.0)[TOKENS], rtol=1e-9)
    merged = tuned.merge(params, variables)
    np.testing.assert_allclose(tuned.model.apply(merged, TOKENS), moved, rtol=1e-9)
    np.testing.assert_allclose(tuned.unmerge(merged, variables)["embedding"], params["embedding"], atol=1e-9)


def test_merging_into_bfloat16_sums_in_single_precision():
    model = nn.Dense(8, param_dtype=jnp.bfloat16)
    tuned, variables, params = started(LoRA(2), model)
    variables["delta"]["~lora"]["b"] = jnp.full((2, 8), 0.01)
    merged = tuned.merge(params, variables)["kernel"]
    start = lora_of(variables)
    exact = np.asarray(params["kernel"], np.float64) + 8.0 * start["a"] @ start["b"]
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged, jnp.asarray(exact, jnp.bfloat16))


@pytest.mark.parametrize(
    ("method", "model", "x", "message"),
    [
        (LoRA(9), DENSE, X, "LoRA rank=9 exceeds its 12x8 matrix; at most 8"),
        (LoRA(9, initialisation="pissa"), DENSE, X, "LoRA rank=9 exceeds its 12x8 matrix"),
        (LoRA(13), nn.Embed(20, 12), TOKENS, "LoRA rank=13 exceeds its 20x12 matrix"),
        (LoRA(2, initialisation="olora"), nn.Embed(20, 12), TOKENS, "give it one of uniform, gaussian"),
    ],
    ids=["rank", "rank of pissa", "rank of an embedding", "olora of an embedding"],
)
def test_what_does_not_fit_is_an_error(method, model, x, message):
    with pytest.raises(InputError, match=message) as caught:
        started(method, model, x=x)
    assert "\n" not in str(caught.value)


def test_an_unknown_initialisation_is_an_error():
    with pytest.raises(InputError, match="'orthogonal' is not one of uniform, gaussian, pissa, olora"):
        LoRA(initialisation="orthogonal")


@pytest.mark.parametrize("alpha", [0.0, -4.0])
def test_pissa_needs_a_scale_that_has_a_root(alpha):
    with pytest.raises(InputError, match=f"alpha={alpha} must be above 0 for initialisation='pissa'"):
        LoRA(initialisation="pissa", alpha=alpha)


def test_a_rank_is_an_integer():
    with pytest.raises(InputError, match=r"LoRA rank=2.5 is a float; it must be an integer"):
        LoRA(rank=2.5)


def flat(tree):
    """Leaves by `/` path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
