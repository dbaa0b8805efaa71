"""Every implementation of the sparse feed-forward layer against neurons computed one by one in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models.kernels.sparse import (
    Experts,
    implementations,
    native,
    sparse_feed_forward,
    sparse_request,
)
from modicum.models.kernels.sparse.native import Native, compiler, library, register
from modicum.models.kernels.sparse.registry import choose
from modicum.models.kernels.sparse.request import SparseRequest

pytestmark = pytest.mark.usefixtures("quick_compile")

E, N, D, K = 6, 8, 16, 2
PORTABLE = ("mask", "gather", "steps")
NATIVE = pytest.param("native", marks=pytest.mark.skipif(compiler() is None, reason="no C++ compiler"))
ACTIVATIONS = {
    "relu": lambda z: np.maximum(z, 0),
    "silu": lambda z: z / (1 + np.exp(-z)),
}


def drawn(activation="relu", gated=False, biased=True, dtype=np.float32, seed=0):
    draw = np.random.default_rng(seed)

    def normal(*shape):
        return draw.normal(size=shape).astype(dtype)

    return Experts(
        up=normal(E, N, D),
        down=normal(E, N, D),
        gate=normal(E, N, D) if gated else None,
        up_bias=normal(E, N) if biased else None,
        gate_bias=normal(E, N) if biased and gated else None,
        down_bias=normal(D) if biased else None,
        activation=activation,
    )


def inputs(tokens=3, chosen=K, dtype=np.float32):
    draw = np.random.default_rng(1)
    picked = np.stack([draw.permutation(E)[:chosen] for _ in range(tokens)]).astype(np.int32)
    return draw.normal(size=(tokens, D)).astype(dtype), picked


def one_by_one(x, experts, chosen):
    """Neuron by neuron, in float64."""
    leaves = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), experts)
    act, out = ACTIVATIONS[experts.activation], []
    for row, picks in zip(np.asarray(x, np.float64), np.asarray(chosen)):
        total = np.zeros(D) if leaves.down_bias is None else leaves.down_bias.copy()
        for e in picks:
            for n in range(N):
                value = leaves.up[e, n] @ row + (0 if leaves.up_bias is None else leaves.up_bias[e, n])
                if leaves.gate is None:
                    value = act(value)
                else:
                    bias = 0 if leaves.gate_bias is None else leaves.gate_bias[e, n]
                    value *= act(leaves.gate[e, n] @ row + bias)
                total += value * leaves.down[e, n]
        out.append(total)
    return np.array(out)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """What is compiled here is not found by anybody else, and nothing that was compiled before is found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        library.cache_clear()
        yield
    library.cache_clear()


@pytest.mark.parametrize("impl", [*PORTABLE, NATIVE])
@pytest.mark.parametrize(("activation", "gated", "biased"), [("relu", False, True), ("silu", True, False)])
def test_each_is_the_sum_of_the_chosen_neurons(impl, activation, gated, biased):
    experts = drawn(activation, gated, biased)
    x, chosen = inputs()
    found = jax.jit(lambda *given: sparse_feed_forward(*given, impl=impl))(x, experts, chosen)
    np.testing.assert_allclose(found, one_by_one(x, experts, chosen), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("impl", [*PORTABLE, NATIVE])
def test_one_token_of_a_batch_and_all_experts(impl):
    experts = drawn("silu", gated=True)
    x, chosen = inputs(tokens=1, chosen=E)
    found = sparse_feed_forward(x[None], experts, chosen[None], impl=impl)
    assert found.shape == (1, 1, D)
    np.testing.assert_allclose(found[0], one_by_one(x, experts, chosen), rtol=2e-5, atol=2e-5)
    other = sparse_feed_forward(x, experts, chosen[:, ::-1], impl=impl)  # which comes first is no matter
    np.testing.assert_allclose(other, found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["gather", "steps", NATIVE])
def test_gradients_are_the_masks(impl):
    experts = drawn("silu", gated=True)
    x, chosen = inputs()
    weights = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)

    def loss(x, experts, impl):
        return (sparse_feed_forward(x, experts, chosen, impl=impl) * weights).sum()

    expected = jax.grad(loss, (0, 1))(x, experts, "mask")
    found = jax.grad(loss, (0, 1))(x, experts, impl)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)
    unused = sorted(set(range(E)) - set(chosen.ravel()))
    assert not np.any(np.asarray(found[1].up)[unused]), "what no token chose has no gradient"


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_a_kernels_gradient_is_gathers_for_few_tokens_and_masks_for_many():
    def loss(x, experts, impl, chosen):
        return jnp.square(sparse_feed_forward(x, experts, chosen, impl=impl)).sum()

    for tokens, copied in ((3, True), (7, False)):
        x, chosen = inputs(tokens)
        slope = functools.partial(jax.grad(loss, (0, 1)), x, drawn("silu", gated=True))
        assert ("scan" in str(jax.make_jaxpr(slope, 0)("native", chosen))) == copied
        found, expected = slope("native", chosen), slope("mask", chosen)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), found, expected)


@pytest.mark.parametrize("impl", PORTABLE)
def test_half_types_add_up_in_float32(impl):
    experts = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), drawn())
    x, chosen = inputs()
    found = sparse_feed_forward(x.astype(jnp.bfloat16), experts, chosen, impl=impl)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(found, np.float32),
        one_by_one(x.astype(jnp.bfloat16), experts, chosen),
        rtol=0.05,
        atol=0.2,
    )


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("activation", ["relu2", "gelu", "gelu_tanh", "sigmoid", "tanh"])
def test_native_activations_are_ours(activation):
    experts = drawn(activation)
    x, chosen = inputs()
    expected = sparse_feed_forward(x, experts, chosen, impl="mask")
    found = sparse_feed_forward(x, experts, chosen, impl="native")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", [*PORTABLE, NATIVE])
@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_what_is_not_a_number_stays_so(impl, activation):
    x, chosen = inputs()
    x[1, 0] = np.nan
    found = np.asarray(sparse_feed_forward(x, drawn(activation), chosen, impl=impl))
    assert np.isnan(found[1]).all() and np.isfinite(found[[0, 2]]).all()


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_native_gives_the_same_bits_every_time():
    draw = np.random.default_rng(2)
    up, down = draw.normal(size=(2, 64, 8, 256)).astype(np.float32)
    x = draw.normal(size=(4, 256)).astype(np.float32)
    chosen = np.stack([draw.permutation(64)[:40] for _ in range(4)]).astype(np.int32)
    found = {sparse_feed_forward(x, Experts(up, down), chosen, impl="native").tobytes() for _ in range(50)}
    assert len(found) == 1
    wanted = sparse_feed_forward(x, Experts(up, down), chosen, impl="mask")  # threads share so many rows
    alone = np.frombuffer(found.pop(), np.float32).reshape(x.shape)
    np.testing.assert_allclose(alone, wanted, rtol=1e-4, atol=1e-2)


@pytest.fixture
def uncompiled(monkeypatch, tmp_path):
    """A machine on which nothing was compiled yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.cache_clear()
    yield
    library.cache_clear()


def chosen_for(**changes):
    return choose.__wrapped__(asked(**changes), "auto").name


def test_native_code_is_not_compiled_unasked(uncompiled, monkeypatch):
    assert "impl='native' does so" in Native().unfit(asked())
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler" in Native().supports(asked())
    assert chosen_for() == "gather"


def asked(**changes):
    given = {"platform": "cpu", "tokens": 1, "experts": 128, "chosen": 13, "size": 32, "width": 1024}
    return SparseRequest(**{**given, "dtype": "float32", "gated": False, "activation": "relu", **changes})


def test_few_tokens_gather_and_many_are_masked(uncompiled, monkeypatch):
    assert chosen_for() == "gather"
    assert chosen_for(tokens=512) == chosen_for(chosen=64) == "mask"
    assert chosen_for(tokens=8) == chosen_for(tokens=4, chosen=26) == "gather"
    assert chosen_for(tokens=16) == chosen_for(tokens=8, chosen=26) == chosen_for(chosen=128) == "mask"
    assert chosen_for(tokens=4, platform="gpu") == "mask", "on others, where copies go through memory"
    library().parent.mkdir(parents=True)
    library().touch()  # as if it had been compiled
    monkeypatch.setattr(native, "register", register.__wrapped__)
    assert "cannot be loaded" in Native().unfit(asked())
    assert chosen_for() == "gather"
    monkeypatch.setattr(native, "register", lambda: None)
    assert chosen_for() == chosen_for(chosen=64) == chosen_for(tokens=128, chosen=38) == "native"
    assert chosen_for(tokens=129) == chosen_for(tokens=17, chosen=64) == "mask"
    assert chosen_for(tokens=3, chosen=96) == "mask" and chosen_for(tokens=2, chosen=96) == "native"
    assert chosen_for(tokens=512) == chosen_for(partitioned=True, chosen=64) == "mask"
    assert choose(asked(tokens=512), "gather").name == "gather"
    with pytest.raises(InputError, match=r"impl='none' is unknown; valid are auto, .*gather"):
        choose(asked(), "none")
    assert set(PORTABLE) <= {each.name for each in implementations()}


def test_types_that_differ_are_not_for_the_kernels():
    experts = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), drawn())
    x, chosen = inputs()
    assert "not bfloat16 and float32" in Native().supports(sparse_request(x, experts, chosen))
    found = sparse_feed_forward(x, experts, chosen)
    np.testing.assert_allclose(found, one_by_one(x, experts, chosen), rtol=2e-5, atol=2e-5)


def test_a_library_that_cannot_be_loaded_is_named(uncompiled, monkeypatch):
    library().parent.mkdir(parents=True)
    library().touch()
    with pytest.raises(InputError, match=r"sparse-.*cannot be loaded.*delete it"):
        register.__wrapped__()
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    library.cache_clear()
    assert library().is_absolute()


def test_what_does_not_fit_is_named():
    experts = drawn()
    x, chosen = inputs()
    with pytest.raises(InputError, match=r"x \[3, 15\]"):
        sparse_feed_forward(x[:, 1:], experts, chosen)
    with pytest.raises(InputError, match="7 experts a token of 6"):
        sparse_feed_forward(x, experts, np.zeros((3, 7), np.int32))
    with pytest.raises(InputError, match="up_bias"):
        sparse_feed_forward(x, experts.replace(up_bias=np.zeros((E, 3))), chosen)
    with pytest.raises(InputError, match="gate_bias is given"):
        sparse_feed_forward(x, experts.replace(gate_bias=experts.up_bias), chosen)
