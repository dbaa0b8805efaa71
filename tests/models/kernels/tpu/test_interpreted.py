"""Tier 1: the TPU kernels, interpreted on the CPU, against float64.

Registers of 8 lanes instead of 128 let short sequences have many tiles; the rest of the code is the same.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from modicum import InputError
from modicum.models.kernels import (
    ALiBi,
    Bias,
    Bucketed,
    Causal,
    Dense,
    DenseBias,
    Dropout,
    Full,
    Keys,
    Lengths,
    Prefix,
    Relations,
    Segments,
    Terms,
    Window,
    attention,
)
from modicum.models.kernels.request import abstract
from modicum.models.kernels.tpu import Blocks, Tpu

from ..cases import check, computed, request_of
from ..drawing import Case, cases

SMALL = Tpu(interpret=True, forward=Blocks(16, 16, 8), backward=Blocks(8, 16, 8), lanes=8)
TWO = dataclasses.replace(SMALL, fused=False)  # kernels for the gradients of q, k and v instead of one
B, T, S, H, G, K = 2, 21, 29, 4, 2, 8


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def flags(*shape, share=0.5):
    return np.random.default_rng(shape).random(shape) < share


def ids(length):
    return np.sort(np.random.default_rng(length).integers(0, 4, (B, length)), axis=1)


def case_of(terms, queries=T, keys=S, width=K):
    q, d_out = (normal(B, queries, H, width, seed=i) for i in range(2))
    k, v = (normal(B, keys, G, width, seed=i) for i in range(2, 4))
    return Case(q, k, v, terms, d_out, normal(B, H, queries))


def relations(groups, most):
    """Relations up to `most`, of queries to five segments, and buckets for relation 0."""
    rng = np.random.default_rng(most)
    draw = lambda high, *shape: rng.integers(0, high, shape)  # noqa: E731
    sides = [draw(most + 1, B, T, 5), draw(5, B, S), draw(60, B, T), draw(60, 1, S)]
    sides[0] *= rng.random(sides[0].shape) < 0.5
    sides += [draw(2, B, T), draw(2, B, S)] if groups else []
    return Relations(normal(16 + most, H), *sides, buckets=16, max_distance=32)


TERMS = {
    "full": Terms(Full(), scale=0.3),
    "causal": Terms(Causal(), scale=0.3),
    "tree, empty rows": Terms(
        (Causal(np.array([2, -9])) & ~Window(2, 0)) | (Lengths(np.array([3, S])) & Dense(flags(1, H, 1, S))),
        scale=0.3,
    ),
    "segments, soft cap": Terms(
        (Causal() & Segments(ids(T), ids(S))) | Keys(flags(B, S, share=0.1)), scale=0.3, soft_cap=2.0
    ),
    "dense bias": Terms(Causal(5), DenseBias(normal(1, H, T, S)), scale=0.3),
    "bias of keys": Terms(Dense(flags(B, 1, T, S)), DenseBias(normal(B, 1, 1, S)), scale=0.3, soft_cap=2.0),
    "bias of queries": Terms(Lengths(11), DenseBias(normal(1, H, T, 1)), scale=0.3, soft_cap=2.0),
    "bucketed, traced offset": Terms(
        Window(9, 3), Bucketed(normal(8, H), max_distance=16, offset=np.asarray(3)), scale=0.3
    ),
    "bucketed, one side": Terms(Full(), Bucketed(normal(8, H), False, max_distance=5, offset=-2), scale=0.3),
    "alibi": Terms(Prefix(np.array([3, 0])), ALiBi(abs(normal(H)), offset=2), scale=0.3),
    "relations, groups": Terms(Causal(5), relations(True, 3), scale=0.3),
    "sinks, dropout": Terms(
        Causal(np.array([-3, 1])), sinks=normal(H), dropout=Dropout(0.3, np.uint32(5)), scale=0.3
    ),
}


@pytest.mark.parametrize("name", TERMS)
def test_float32_errs_by_rounding_only(name):
    check(SMALL, case_of(TERMS[name]))


def test_relations_beyond_what_bfloat16_holds():
    """Two bytes of each are multiplied apart; with registers as wide as a chip's, and all else by default."""
    check(Tpu(interpret=True), case_of(Terms(Full(), relations(False, 300), scale=0.3, soft_cap=2.0)))


@pytest.mark.parametrize("name", ["tree, empty rows", "segments, soft cap"])
def test_two_kernels_for_the_gradients_do_too(name):
    check(TWO, case_of(TERMS[name]))


@pytest.mark.parametrize("name", ["causal", "sinks, dropout"])
def test_bfloat16_errs_no_more_than_twice_the_plain_softmax(name):
    check(SMALL, case_of(TERMS[name]), jnp.bfloat16)


def drawn(dtype, examples):
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases())
    def each(case):
        check(SMALL, case, dtype)

    each()


@pytest.mark.parametrize(("dtype", "examples"), [("float32", 4), ("bfloat16", 2)])
def test_drawn_cases(dtype, examples):
    drawn(getattr(jnp, dtype), examples)


def test_lanes_of_the_chip_and_its_own_blocks():
    """What runs on a TPU but for the compiler: 128 lanes, blocks by request, padding of lengths and width."""
    check(Tpu(interpret=True), case_of(Terms(Causal(9), ALiBi(abs(normal(H)), 40), 0.2), 130, 200, width=80))


def test_a_zero_cotangent_gives_zero_gradients_and_hidden_rows_too():
    """The first row of the batch has the one, the second the others."""
    case = case_of(Terms(Causal(np.array([2, -9])), scale=0.3))
    some = np.arange(B) == 1
    d_out, d_lse = case.d_out * some[:, None, None, None], case.d_lse * some[:, None, None]
    found = computed(SMALL, dataclasses.replace(case, d_out=d_out, d_lse=d_lse), jnp.float32)
    hidden = np.asarray(found.lse) == -np.inf
    assert hidden[1].any()
    np.testing.assert_array_equal(np.asarray(found.out).swapaxes(1, 2)[hidden], 0)
    np.testing.assert_array_equal(np.asarray(found.dq).swapaxes(1, 2)[hidden], 0)
    for gradient in (found.dq, found.dk, found.dv):
        np.testing.assert_array_equal(gradient[0], 0)
        assert abs(gradient[1]).max() > 0


def test_the_gradient_of_a_shared_bias_is_never_as_large_as_all_scores():
    queries, heads, batch = 256, 2, 8
    shape = jax.ShapeDtypeStruct((batch, queries, heads, 64), jnp.float32)
    bias = jax.ShapeDtypeStruct((1, heads, queries, queries), jnp.float32)

    def loss(q, k, v, values):
        return Tpu(interpret=True)(q, k, v, Terms(Causal(), DenseBias(values)))[0].sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2, 3)))(shape, shape, shape, bias)
    sizes = [np.prod(v.aval.shape) for equation in _equations(jaxpr.jaxpr) for v in equation.outvars]
    assert batch * heads * queries * queries > max(sizes) >= heads * queries * queries


def _equations(jaxpr):
    """Of a program and all it calls, kernels apart."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name != "pallas_call":
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
                if _is_jaxpr(inner):
                    yield from _equations(getattr(inner, "jaxpr", inner))


def _is_jaxpr(value):
    return hasattr(value, "eqns")


@pytest.mark.parametrize("queries, keys", [(8, 1), (1, 9)])
def test_an_axis_of_one(queries, keys):
    """Padding leaves axes of size 1 alone where they broadcast; those of q, k and v do not."""
    check(SMALL, case_of(Terms(Full(), scale=0.5), queries, keys), jnp.float32)


def test_neither_key_nor_sink_is_no_weight():
    terms = Terms(Lengths(np.asarray([0, 5])), scale=0.5, sinks=np.asarray([-np.inf, 1, 0, 2], np.float32))
    check(SMALL, case_of(terms), jnp.float32)


def test_what_it_cannot_do_has_a_reason():
    tpu, case = Tpu(), case_of(TERMS["causal"])
    request = dataclasses.replace(request_of(case, jnp.float32), platform="tpu")
    assert tpu.supports(request) is None
    assert tpu.supports(dataclasses.replace(request, platform="cpu")) == "it is for TPUs, not cpu"
    assert "not float64" in tpu.supports(dataclasses.replace(request, dtype="float64"))
    assert tpu.supports(dataclasses.replace(request, bias=abstract(TERMS["relations, groups"].bias))) is None
    assert "cannot compute a Bias bias" in tpu.supports(dataclasses.replace(request, bias=Bias()))
    assert "tiles" in tpu.supports(dataclasses.replace(request, queries=1 << 20, keys=1 << 20))
    assert "1 queries" in tpu.unfit(dataclasses.replace(request, queries=1))


def test_the_front_names_it():
    q, k, _ = (jnp.zeros((1, 8, 2, 8)) for _ in range(3))
    with pytest.raises(InputError, match="impl='tpu' cannot compute this attention: it is for TPUs, not"):
        attention(q, k, k, mask=Causal(), impl="tpu")


def test_registered_before_the_fallbacks():
    from modicum.models.kernels.registry import choose

    request = dataclasses.replace(request_of(case_of(TERMS["causal"]), jnp.bfloat16), platform="tpu")
    assert choose(request, "auto").name == "tpu"
    assert choose(dataclasses.replace(request, platform="cpu"), "auto").name != "tpu"
    assert choose(dataclasses.replace(request, partitioned=True), "auto").name == "chunked"
    few = functools.partial(dataclasses.replace, request, queries=1)
    assert choose(few(), "auto").name != "tpu"
