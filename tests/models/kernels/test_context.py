"""Attention over four devices is attention on one: outputs, log-sum-exp and every gradient, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from modicum import InputError
from modicum.models.kernels import (
    ALiBi,
    Bucketed,
    Causal,
    DenseBias,
    Dropout,
    Full,
    Lengths,
    Prefix,
    Segments,
    Window,
    attention,
    zigzag_order,
)
from modicum.models.kernels.context import context_attention
from modicum.models.kernels.masks import Sizes, describe
from modicum.models.kernels.merging import merge, merge_sinks
from modicum.models.kernels.spans import Span

from .cases import FAST_COMPILE
from .drawing import biases, masks

B, T, H, G, K, DEVICES = 2, 16, 4, 2, 4, 4
RNG = np.random.default_rng(0)
SEGMENTS = Segments(np.array([[1] * 5 + [2] * 9 + [0] * 2, [1] * 16]))
DROPOUT = Dropout(0.3, np.uint32(5))
CALLS = {
    "ring, zigzag": {
        "method": "ring",
        "order": "zigzag",
        "mask": Causal() & SEGMENTS,
        "bias": Bucketed(RNG.normal(size=(8, H)), max_distance=16),
        "sinks": RNG.normal(size=H),
        "dropout": DROPOUT,
    },
    "ring, contiguous": {
        "method": "ring",
        "order": "contiguous",
        "mask": Prefix(np.array([3, 0])) & Window(6, None),
        "bias": DenseBias(RNG.normal(size=(1, H, T, T))),
        "soft_cap": 2.0,
    },
    "gather, zigzag": {
        "method": "gather",
        "order": "zigzag",
        "mask": Causal() & Lengths(np.array([0, 16])),
        "bias": ALiBi(np.array([0.5, 0.1, 0.3, 1.0])),
        "sinks": RNG.normal(size=H),
        "dropout": DROPOUT,
    },
    "gather, contiguous": {"method": "gather", "order": "contiguous", "mask": Window(3, 2), "bias": None},
}


def arrays(length=T):
    shapes = [(B, length, H, K), (B, length, G, K), (B, length, G, K), (B, length, H, K), (B, H, length)]
    return [RNG.normal(size=shape) for shape in shapes]


def values_and_gradients(call, q, k, v, terms, d_out, d_lse):
    (out, lse), pull = jax.vjp(call, q, k, v, terms)
    dq, dk, dv, d_terms = pull((d_out, d_lse))
    floats = [x for x in jax.tree.leaves(d_terms) if x.dtype != jax.dtypes.float0]
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv} | {
        f"term {i}": x for i, x in enumerate(floats)
    }


@pytest.mark.parametrize("name", CALLS)
def test_devices_in_a_ring_are_one_device(x64, name):
    options = dict(CALLS[name])
    method, order = options.pop("method"), options.pop("order")
    static = {"soft_cap": options.pop("soft_cap", None), "scale": 0.4, "return_lse": True}
    mesh = jax.make_mesh((DEVICES,), ("context",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    along, rows = PartitionSpec(None, "context"), PartitionSpec(None, None, "context")

    def spread(q, k, v, terms):
        call = lambda q, k, v, terms: context_attention(  # noqa: E731
            q, k, v, axis="context", method=method, order=order, impl="chunked", **terms, **static
        )
        specs = (along, along, along, PartitionSpec())
        return jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=(along, rows))(q, k, v, terms)

    def alone(q, k, v, terms):
        return attention(q, k, v, impl="reference", **terms, **static)

    q, k, v, d_out, d_lse = arrays()
    places = zigzag_order(T, DEVICES) if order == "zigzag" else np.arange(T)
    back = np.argsort(places)
    on_one, on_four = (
        jax.jit(lambda *x, call=call: values_and_gradients(call, *x), compiler_options=FAST_COMPILE)
        for call in (alone, spread)
    )
    wanted = on_one(q, k, v, options, d_out, d_lse)
    found = on_four(*(x[:, places] for x in (q, k, v)), options, d_out[:, places], d_lse[:, :, places])
    assert len(found) == len(wanted)
    for part, value in found.items():
        if part in ("out", "dq", "dk", "dv"):
            value = value[:, back]
        value = value[:, :, back] if part == "lse" else value
        np.testing.assert_allclose(value, wanted[part], rtol=1e-10, atol=1e-10, err_msg=part)


def test_zigzag_gives_every_device_an_early_and_a_late_chunk():
    np.testing.assert_array_equal(
        zigzag_order(16, 4).reshape(4, 4)[:, ::2], [[0, 14], [2, 12], [4, 10], [6, 8]]
    )
    with pytest.raises(InputError, match="12 is not a multiple of twice the 4 devices"):
        zigzag_order(12, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "snake"}, "order is 'snake'; valid are zigzag"),
        ({"method": "x"}, "method is 'x'"),
        ({}, "3 positions"),
    ],
)
def test_what_cannot_be_is_named(options, message):
    mesh = jax.make_mesh((2,), ("context",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    along = PartitionSpec(None, "context")
    call = lambda q: context_attention(q, q, q, axis="context", mask=Full(), **options)  # noqa: E731
    with pytest.raises(InputError, match=message):
        jax.shard_map(call, mesh=mesh, in_specs=along, out_specs=along)(jnp.ones((1, 6, 2, 4)))


def test_merging_halves_of_the_keys_is_attention_on_all(x64):
    """Row 0 sees nothing, row 1 of the batch only keys of one side; gradients go through both."""
    q, k, v, d_out, d_lse = arrays()
    mask, sinks = Lengths(np.array([0, 7])) | Window(2, 0), RNG.normal(size=H)
    mask = mask & ~(Window(0, 0) | Lengths(np.array([16, 0])))

    def halves(q, k, v, sinks):
        rows, parts = Span(0, T), []
        for columns in (Span(0, 8), Span(8, 8)):
            cut = [columns.cut(x, 1) for x in (k, v)]
            parts += attention(q, *cut, mask=mask.cut(rows, columns), impl="reference", return_lse=True)
        return merge_sinks(*merge(*parts), sinks)

    def whole(q, k, v, sinks):
        return attention(q, k, v, mask=mask, sinks=sinks, impl="reference", return_lse=True)

    for call in (lambda *x: merge_sinks(*whole(*x[:3], None), x[3]), halves):
        found, wanted = (
            jax.jit(lambda *x, call=call: (call(*x), jax.vjp(call, *x)[1]((d_out, d_lse))))(q, k, v, sinks)
            for call in (call, whole)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), found, wanted)


def test_merging_nothing_with_nothing_is_nothing():
    out, lse = jnp.zeros((1, 2, 1, 3)), jnp.full((1, 1, 2), -jnp.inf)
    merged, pull = jax.vjp(merge, out, lse, out, lse)
    assert (merged[0] == 0).all() and (merged[1] == -jnp.inf).all()
    assert all((x == 0).all() for x in pull((out + 1, jnp.ones_like(lse))))


@settings(max_examples=15, deadline=None, database=None, phases=[Phase.generate])
@given(data=st.data())
def test_a_cut_is_the_part_of_the_whole(data):
    sizes = Sizes(2, 3, 13, 17)
    mask, bias = data.draw(masks(sizes)), data.draw(biases(sizes))
    rows, columns = (
        (Span(4, 6), Span(5, 8))
        if data.draw(st.booleans())
        else (Span(jnp.asarray(4), 6), Span(jnp.asarray(5), 8))
    )
    inner = Span(0, 6), Span(0, 8)
    whole = np.broadcast_to(mask.predicate(Span(0, 13), Span(0, 17)), sizes)[:, :, 4:10, 5:13]
    cut = np.broadcast_to(mask.cut(rows, columns).predicate(*inner), (2, 3, 6, 8))
    np.testing.assert_array_equal(cut, whole, err_msg=describe(mask))
    if bias is not None:
        whole = np.broadcast_to(bias.tile(Span(0, 13), Span(0, 17)), sizes)[:, :, 4:10, 5:13]
        cut = np.broadcast_to(bias.cut(rows, columns).tile(*inner), (2, 3, 6, 8))
        np.testing.assert_allclose(cut, whole, rtol=1e-6, err_msg=describe(bias))
