"""The implementations for every platform, and the reference, against the definition in NumPy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from modicum.models.kernels import (
    ALiBi,
    Bucketed,
    Causal,
    Dense,
    DenseBias,
    Dropout,
    Full,
    Lengths,
    Prefix,
    Segments,
    Terms,
    Window,
    attention,
    attention_probabilities,
)
from modicum.models.kernels.chunked import Chunked
from modicum.models.kernels.reference import Reference
from modicum.models.kernels.spans import Span
from modicum.models.kernels.whole import Whole

from .cases import FAST_COMPILE, computed, exact, largest, listed
from .drawing import Case

pytestmark = pytest.mark.usefixtures("quick_compile")
B, H, K = 2, 4, 8
CHUNKED = Chunked(block=8)
RAGGED, EVEN = (21, 29), (24, 24)  # T, S: with blocks of 8 the first needs padding


def arrays(queries, keys, groups, dtype=jnp.float64, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(B, queries, H, K), (B, keys, groups, K), (B, keys, groups, K)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def masks(queries, keys):
    rng = np.random.default_rng(1)
    segments = Segments(*(np.sort(rng.integers(0, 4, (B, n))) for n in (queries, keys)))
    lengths = Lengths(np.array([3, keys]))
    some_keys = Dense(rng.random((1, H, 1, keys)) < 0.5)
    return {
        "full": Full(),
        "causal": Causal(),
        "causal, traced offset": Causal(np.array([2, -9])),  # the second row has no key at first
        "window": Window(5, 3),
        "prefix": Prefix(lengths.lengths),
        "segments": segments,
        "lengths": Lengths(np.array([0, 11])),
        "dense": Dense(rng.random((B, 1, queries, keys)) < 0.3),
        "packed causal": Causal() & segments,
        "tree": (Causal() & ~Window(2, 0)) | (lengths & some_keys),
    }


def biases(queries, keys, dtype=np.float64):
    rng = np.random.default_rng(2)

    def draw(*shape):
        return rng.normal(size=shape).astype(dtype)

    return {
        "none": None,
        "dense": DenseBias(draw(1, H, queries, keys)),
        "dense, broadcast": DenseBias(draw(B, 1, 1, keys)),
        "bucketed": Bucketed(draw(8, H), max_distance=16),
        "bucketed, one side": Bucketed(draw(8, H), bidirectional=False, max_distance=16, offset=np.array(3)),
        "alibi": ALiBi(abs(draw(H)), offset=2),
    }


@functools.partial(jax.jit, static_argnums=(0,), compiler_options=FAST_COMPILE)
def values_and_gradients(implementation, q, k, v, mask, bias, sinks=None):
    """Output, log-sum-exp and the gradients of a random function of both."""

    def call(q, k, v, bias, sinks):
        return implementation(q, k, v, Terms(mask, bias, 0.4, sinks=sinks))

    (out, lse), pull = jax.vjp(call, q, k, v, bias, sinks)
    keys = jax.random.split(jax.random.key(0))
    cotangents = jax.random.normal(keys[0], out.shape), jax.random.normal(keys[1], lse.shape)
    return out, lse, pull(tuple(c.astype(x.dtype) for c, x in zip(cotangents, (out, lse))))


def assert_defined(implementation, q, k, v, terms, dtype=jnp.float64, forward=1e-10, gradient=1e-10):
    """Results and gradients are those of the definition in NumPy; gradients on the scale of the largest."""
    rng, shape = np.random.default_rng(3), (*q.shape[:3], v.shape[3])
    case = Case(q, k, v, terms, rng.normal(size=shape), rng.normal(size=(B, H, q.shape[1])))
    found, wanted = computed(implementation, case, dtype), exact(case, dtype)
    for name in found._fields:
        for a, b in zip(listed(getattr(found, name)), listed(getattr(wanted, name)), strict=True):
            tolerance = forward if name in ("out", "lse") else gradient
            scale = 1 if name in ("out", "lse") else max(1, largest(b))
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale, err_msg=name)


def compare(mask, bias, groups, soft_cap, shape, dtype=jnp.float64, tested=CHUNKED, **tolerances):
    terms = Terms(masks(*shape)[mask], biases(*shape, np.dtype(dtype))[bias], 0.4, soft_cap)
    assert_defined(tested, *arrays(*shape, groups, dtype), terms, dtype, **tolerances)


MASKS, BIASES = list(masks(*EVEN)), list(biases(*EVEN))
OPTIONS = list(itertools.product((4, 2, 1), (None, 2.0), (RAGGED, EVEN)))
# every mask, bias and combination of options at least once; each pair of mask and bias in the slow test
FAST = [(MASKS[i % 10], BIASES[(i + i // 10) % 6], *option) for i, option in enumerate(OPTIONS)]


@pytest.mark.parametrize(("mask", "bias", "groups", "soft_cap", "shape"), FAST, ids=str)
def test_chunked_is_the_definition_in_float64(x64, mask, bias, groups, soft_cap, shape):
    compare(mask, bias, groups, soft_cap, shape)


@pytest.mark.parametrize(("mask", "groups"), list(zip(MASKS, itertools.cycle((4, 2, 1)))), ids=str)
def test_whole_is_the_definition_in_float64(x64, mask, groups):
    compare(mask, "none", groups, None, RAGGED, tested=Whole())


def test_whole_is_the_definition_in_float32():
    compare("full", "none", 4, None, EVEN, jnp.float32, Whole(), forward=1e-5, gradient=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
def test_chunked_is_the_definition_in_float64_for_every_mask_and_bias(x64, mask):
    for i, bias in enumerate(BIASES):
        compare(mask, bias, *OPTIONS[(7 * i + 5 * MASKS.index(mask)) % len(OPTIONS)])


@pytest.mark.parametrize(
    ("mask", "bias", "groups", "soft_cap", "shape"),
    [
        ("packed causal", "bucketed", 2, None, RAGGED),
        ("causal", "none", 4, None, EVEN),
        ("window", "alibi", 1, 2.0, EVEN),
    ],
    ids=str,
)
def test_chunked_is_the_definition_in_float32(mask, bias, groups, soft_cap, shape):
    compare(mask, bias, groups, soft_cap, shape, jnp.float32, forward=1e-5, gradient=1e-4)


@pytest.mark.parametrize(
    "examples", [2, pytest.param(10, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_chunked_is_the_definition_on_random_masks(x64, random_masks, examples):
    q, k, v = arrays(*RAGGED, 2)

    @settings(max_examples=examples, deadline=None, database=None, phases=[Phase.generate])
    @given(mask=random_masks(B, H, *RAGGED))
    def check(mask):
        assert_defined(CHUNKED, q, k, v, Terms(mask, None, 0.4))

    check()


DROPOUT = Dropout(0.3, np.uint32(7))


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["", "dropout"])
@pytest.mark.parametrize("sinks", [None, np.array([0.5, -1, 3, -np.inf])], ids=["", "sinks"])
def test_chunked_has_sinks_and_dropout(x64, sinks, dropout):
    shape = RAGGED
    terms = Terms(masks(*shape)["segments"], biases(*shape)["bucketed"], 0.4, 2.0, sinks, dropout)
    assert_defined(CHUNKED, *arrays(*shape, 2), terms)


def test_a_sink_is_a_key_without_a_value(x64):
    q, k, v = arrays(*RAGGED, H)
    sinks = jnp.array([0.5, -1, 3, 0])
    more = lambda x: jnp.concatenate([jnp.zeros((B, 1, H, K)), x], 1)  # noqa: E731
    bias = jnp.concatenate(
        [jnp.broadcast_to(sinks[:, None, None], (1, H, RAGGED[0], 1)), jnp.zeros((1, H, *RAGGED))], -1
    )
    found = jax.jit(lambda: Reference()(q, k, v, Terms(Full(), None, 0.4, sinks=sinks)))()
    wanted = jax.jit(lambda: Reference()(q, more(k), more(v), Terms(Full(), DenseBias(bias), 0.4)))()
    for a, b in zip(found, wanted):
        np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("implementation", [Reference(), CHUNKED], ids=lambda i: i.name)
def test_a_query_without_keys_has_its_sink(x64, implementation):
    sinks = np.array([0.5, -1, 3, 0])
    mask = Lengths(np.array([0, 29]))
    out, lse, (dq, dk, dv, _, d_sinks) = values_and_gradients(
        implementation, *arrays(*RAGGED, 2), mask, None, sinks
    )
    assert (out[0] == 0).all() and (lse[0] == sinks[:, None]).all()
    assert all((x[0] == 0).all() and jnp.isfinite(x).all() for x in (dq, dk, dv))
    assert (d_sinks != 0).all()


def test_dropout_multiplies_the_weights(x64):
    q, k, v = arrays(*RAGGED, H)
    pattern = attention_probabilities(q, k, mask=Causal(), scale=0.4)
    keep = DROPOUT.keep(*(Span(0, n) for n in pattern.shape)) / 0.7
    attend = functools.partial(attention, q, k, v, mask=Causal(), scale=0.4, return_lse=True)
    out, lse = jax.jit(lambda: attend(dropout=DROPOUT, impl="chunked"))()
    np.testing.assert_allclose(out, jnp.einsum("bhts,bshk->bthk", pattern * keep, v), atol=1e-12)
    plain = jax.jit(lambda: attend(impl="reference"))()[1]
    np.testing.assert_allclose(lse, plain, atol=1e-12)


def test_reference_is_the_definition(x64):
    q, k, v = (np.asarray(x) for x in arrays(*RAGGED, 2))
    mask, bias = masks(*RAGGED)["tree"], biases(*RAGGED)["dense"]
    step = jax.jit(lambda *given: Reference()(*given, Terms(mask, bias, 0.4, 5.0)))
    out, lse = map(np.asarray, step(q, k, v))
    allowed = np.asarray(mask.predicate(Span(0, RAGGED[0]), Span(0, RAGGED[1])))
    allowed = np.broadcast_to(allowed, (B, H, *RAGGED))
    for b, h, t in np.ndindex(B, H, RAGGED[0]):
        live = allowed[b, h, t]
        scores = k[b, live, h // 2] @ q[b, t, h] * 0.4 + bias.values[0, h, t, live]
        weights = np.exp(5 * np.tanh(scores / 5))
        np.testing.assert_allclose(lse[b, h, t], np.log(weights.sum()) if live.any() else -np.inf)
        expected = weights / max(weights.sum(), 1e-300) @ v[b, live, h // 2]
        np.testing.assert_allclose(out[b, t, h], expected, atol=1e-14)


def test_gradients_of_the_reference_are_those_of_the_definition(x64):
    compare("tree", "dense", 2, 2.0, RAGGED, tested=Reference())


def test_gradients_of_the_reference_are_those_of_differences(x64):
    q, k, v = arrays(3, 5, 2)
    table = biases(3, 5)["bucketed"].table

    @jax.jit
    def call(q, k, v, table):
        return Reference()(q, k, v, Terms(Causal(1), Bucketed(table, max_distance=16), 0.4, 2.0))

    check_grads(call, (q, k, v, table), order=1, modes=("rev",), eps=1e-6)


@pytest.mark.parametrize("implementation", [Reference(), Chunked(block=8)], ids=lambda i: i.name)
def test_a_query_without_keys_gives_nothing_and_learns_nothing(x64, implementation):
    q, k, v = arrays(*RAGGED, 2)
    mask = Lengths(jnp.array([0, 29])) & ~(Window(0, 0) | ~Causal())  # row 0, and query 0 of row 1
    out, lse, (dq, dk, dv, *_) = values_and_gradients(implementation, q, k, v, mask, None)
    assert (out[0] == 0).all() and (lse[0] == -jnp.inf).all()
    assert (out[1, 0] == 0).all() and (lse[1, :, 0] == -jnp.inf).all()
    assert (dq[0] == 0).all() and (dk[0] == 0).all() and (dv[0] == 0).all() and (dq[1, 0] == 0).all()
    assert jnp.isfinite(lse[1, :, 1:]).all()
    assert all(jnp.isfinite(x).all() and abs(x[1]).max() > 0 for x in (dq, dk, dv))


def test_bfloat16_errs_no_more_than_twice_the_plain_softmax(x64):
    exact = arrays(*EVEN, 2)
    half = [x.astype(jnp.bfloat16) for x in exact]
    wanted = values_and_gradients(Reference(), *(x.astype(jnp.float64) for x in half), Causal(), None)
    plain = values_and_gradients(Reference(), *half, Causal(), None)
    ours = values_and_gradients(Chunked(block=8), *half, Causal(), None)
    names = ("out", "lse", "dq", "dk", "dv")
    for name, right, *two in zip(names, *map(jax.tree.leaves, (wanted, ours, plain))):
        error, limit = (float(abs(x.astype(jnp.float64) - right).max()) for x in two)
        assert error <= 2 * limit, (name, error, limit)
    assert ours[0].dtype == jnp.bfloat16 and ours[1].dtype == jnp.float32


def test_the_log_sum_exp_merges_two_halves_of_the_keys(x64):
    q, k, v = arrays(24, 32, 2)
    chunked = Chunked(block=8)

    def halves(q, k, v):
        first, a = chunked(q, k[:, :16], v[:, :16], Terms(Causal(), scale=0.4))
        second, b = chunked(q, k[:, 16:], v[:, 16:], Terms(Causal(-16), scale=0.4))
        weight = jax.nn.sigmoid(a - b).swapaxes(1, 2)[..., None]
        return weight * first + (1 - weight) * second

    whole = lambda q, k, v: chunked(q, k, v, Terms(Causal(), scale=0.4))[0]  # noqa: E731
    found, pull = jax.vjp(jax.jit(halves), q, k, v)
    wanted, pull_wanted = jax.vjp(jax.jit(whole), q, k, v)
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    for a, b in zip(pull(found), pull_wanted(found)):
        np.testing.assert_allclose(a, b, atol=1e-11)


def test_vmap_scan_and_remat_change_nothing(x64):
    q, k, v = arrays(*EVEN, 2)
    mask = masks(*EVEN)["packed causal"]

    def loss(q, k, v, mask):
        return (attention(q, k, v, mask=mask, impl="chunked") ** 2).sum()

    one = jax.tree.map(lambda x: x[:, None], (q, k, v, mask))
    wanted = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v, mask)
    mapped = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2))))(*one)
    scanned = jax.jit(
        lambda xs: jax.lax.scan(lambda _, x: (None, jax.grad(loss, (0, 1, 2))(*x)), None, xs)[1]
    )(one)
    again = jax.jit(jax.grad(jax.checkpoint(loss), (0, 1, 2)))(q, k, v, mask)
    for a, b, c, d in zip(wanted, mapped, scanned, again):
        np.testing.assert_allclose(b[:, 0], a, atol=1e-12)
        np.testing.assert_allclose(c[:, 0], a, atol=1e-12)
        np.testing.assert_allclose(d, a, atol=1e-12)


def test_batch_and_heads_may_be_sharded_without_gathering(x64):
    mesh = jax.make_mesh(
        (2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )
    q, k, v = arrays(*EVEN, 2)
    place = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    chunked = Chunked(block=8)

    def loss(q, k, v):
        return (chunked(q, k, v, Terms(Causal(), scale=0.4))[0] ** 2).sum()

    step = jax.jit(jax.grad(loss, (0, 1, 2)), in_shardings=place, out_shardings=place)
    text = step.lower(q, k, v).compile().as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))
    for a, b in zip(step(q, k, v), jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_shard_map_sums_the_gradient_of_what_all_devices_share(x64):
    types = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=types, devices=jax.devices()[:4])
    q, k, v = arrays(*EVEN, 2)
    table, segments = jnp.asarray(biases(*EVEN)["bucketed"].table), masks(*EVEN)["segments"]

    def loss(q, k, v, segments, table):
        bias = Bucketed(table, max_distance=16)
        return (Chunked(block=8)(q, k, v, Terms(Causal() & segments, bias, 0.4))[0] ** 2).sum()

    heads = PartitionSpec("data", None, "tensor")
    sharded = jax.shard_map(
        lambda *args: jax.lax.psum(loss(*args), ("data", "tensor")),
        mesh=mesh,
        in_specs=(heads, heads, heads, PartitionSpec("data"), PartitionSpec(None, "tensor")),
        out_specs=PartitionSpec(),
    )
    wanted = jax.jit(jax.grad(loss, (0, 1, 2, 4)))(q, k, v, segments, table)
    for a, b in zip(jax.jit(jax.grad(sharded, (0, 1, 2, 4)))(q, k, v, segments, table), wanted):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_probabilities_give_the_output(x64):
    q, k, v = arrays(*RAGGED, 2)
    pattern = attention_probabilities(q, k, mask=Causal(), scale=0.4)
    out = jax.jit(functools.partial(attention, mask=Causal(), scale=0.4, impl="chunked"))(q, k, v)
    np.testing.assert_allclose(pattern.sum(-1), 1)
    np.testing.assert_allclose(jnp.einsum("bhts,bshk->bthk", pattern, v.repeat(2, 2)), out, atol=1e-12)


def test_values_may_have_another_width(x64):
    q, k, v = arrays(*RAGGED, 2)
    assert_defined(CHUNKED, q, k, v[..., :3], Terms(Causal(), scale=0.4))


def test_memory_grows_with_the_length_and_not_its_square():
    def temporary(length):
        q = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        step = jax.grad(lambda q, k, v: attention(q, k, v, mask=Causal(), impl="chunked").sum(), (0, 1, 2))
        return jax.jit(step).lower(q, q, q).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 4096 * 4096 * 4 / 4
    assert temporary(8192) < 3 * temporary(4096)
