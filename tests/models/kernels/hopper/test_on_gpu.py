"""The Hopper kernels on a Hopper GPU: `tests/gpu.sh` runs this and then measures."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from modicum.models.kernels import ALiBi, Bucketed, Causal, Dense, DenseBias, Full, Keys, Terms, Window
from modicum.models.kernels.hopper import Hopper
from modicum.models.kernels.hopper.decoding import HopperPages
from modicum.models.kernels.paged import Gathered, Paged
from modicum.models.kernels.registry import choose
from modicum.parallel import MeshShape, make_mesh

from ..cases import error, largest
from .cases import CASES, DROPOUT, Case, assert_within_twice_plain, draw, packed, values_and_gradients
from .test_pages import call, exact

pytestmark = pytest.mark.gpu

LARGER = (
    Case("causal, K=128", Causal(), 1024, 1024, batch=2, heads=8, kv_heads=2, width=128),
    Case("full, K=64", Full(), 1024, 1024, batch=2, heads=8, kv_heads=8, width=64, dtype=jnp.float16),
    Case("window, ragged", Window(300, 0), 1000, 1000, batch=2, heads=4, width=96, soft_cap=20.0),
    Case("packed causal", Causal() & packed(2, 1024, 7), 1024, 1024, batch=2, heads=4, width=128, sinks=True),
    Case("dense bias", Causal(), 1024, 1024, batch=3, heads=4, bias=DenseBias(draw(1, 4, 1024, 1024))),
    Case(
        "dense bias, one", Full(), 512, 640, batch=3, heads=4, width=128, bias=DenseBias(draw(3, 1, 512, 640))
    ),
    Case("bucketed", Full(), 1024, 1024, batch=2, heads=4, bias=Bucketed(draw(32, 4))),
    Case("bucketed, K=128", Causal(), 700, 700, heads=4, width=128, bias=Bucketed(draw(32, 4), False)),
    Case("ALiBi", Causal(), 1024, 1024, heads=4, width=128, bias=ALiBi(np.float32([0.5, 0.2, 0.1, 0.01]))),
    Case("dropout, K=128", Causal(), 1024, 1024, batch=2, heads=4, kv_heads=2, width=128, dropout=DROPOUT),
    Case(
        "dense mask, K=128",
        Dense(np.random.default_rng(7).random((2, 1, 640, 768)) < 0.3) & Causal(128),
        640,
        768,
        batch=2,
        heads=4,
        width=128,
        dropout=DROPOUT,
    ),
)


@pytest.fixture(autouse=True)
def _hopper():
    if reason := Hopper().supports(_request()):
        pytest.skip(reason)


def _request():
    from modicum.models.kernels import Request

    return Request(jax.default_backend(), 1, 256, 256, 2, 2, 64, 64, "bfloat16", Full(), None, False)


@pytest.mark.parametrize("case", CASES + LARGER, ids=lambda case: case.name)
def test_within_twice_the_error_of_plain_attention(case):
    assert_within_twice_plain(case, jax.jit(Hopper().__call__))


NARROW = [case for case in CASES + LARGER if case.width <= 64 and case.bias is None]


@pytest.mark.parametrize("case", NARROW, ids=lambda case: case.name)
def test_one_kernel_for_all_gradients(case):
    assert_within_twice_plain(case, jax.jit(Hopper(deterministic=False).__call__))


SHARDED = Case("packed causal", LARGER[3].mask, 1024, 1024, batch=2, heads=4, kv_heads=2, dropout=DROPOUT)


def halves():
    """A mesh over two GPUs, where there are so many, else over the one."""
    count = math.gcd(2, len(jax.devices("gpu")))
    return make_mesh(MeshShape.parse(f"data={count}"), jax.devices("gpu")[:count])


@pytest.mark.parametrize("deterministic", [True, False])
def test_inside_shard_map(deterministic):
    hopper, mesh = Hopper(deterministic=deterministic), halves()
    rows = SHARDED.batch // mesh.size

    def half(q, k, v, mask, rest):
        first = DROPOUT.batch + rows * jax.lax.axis_index("data")
        dropout = dataclasses.replace(rest.dropout, batch=first)
        return hopper(q, k, v, dataclasses.replace(rest, mask=mask, dropout=dropout))

    def sharded(q, k, v, terms):
        specs = (*[P("data")] * 4, P())
        placed = jax.shard_map(half, mesh=mesh, in_specs=specs, out_specs=P("data"))
        return placed(q, k, v, terms.mask, dataclasses.replace(terms, mask=Full()))

    assert_within_twice_plain(SHARDED, jax.jit(sharded))


def test_auto_takes_it_where_xla_need_not_split_it():
    assert choose(_request(), "auto").name == "hopper"
    assert choose(dataclasses.replace(_request(), partitioned=True), "auto").name == "chunked"


def test_gradients_are_the_same_every_time():
    case = LARGER[0]
    first, second = (values_and_gradients(Hopper(), case.arrays(), case.terms()) for _ in range(2))
    for name, value in first.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(second[name]), err_msg=name)


PAGED = {
    "one long row": (([9000], 1, 8, 2, 16, 600, 128), lambda start, heads: Terms(Causal(start), scale=0.1)),
    "ragged, window, soft cap": (
        ([217, 0, 1500, 3], 2, 8, 1, 64, 24, 64),
        lambda start, heads: Terms(Window(300, 0, start), scale=0.2, soft_cap=5.0, sinks=jnp.ones(heads)),
    ),
    "many rows, ALiBi, hidden keys": (
        ([2000, 700], 17, 8, 2, 128, 16, 128),
        lambda start, heads: Terms(
            Causal(start) & Keys(jnp.asarray(np.arange(2048) % 5 != 0)[None]),
            ALiBi(jnp.linspace(0.01, 0.5, heads), start),
            scale=0.1,
        ),
    ),
}


@pytest.mark.parametrize("name", PAGED)
def test_pages_in_place_err_no_more_than_twice_what_copies_do(name):
    sizes, terms_of = PAGED[name]
    given = call(*sizes)
    terms = terms_of(given[3] - sizes[1], sizes[2])
    found, plain = jax.jit(HopperPages().__call__)(*given, terms), Gathered()(*given, terms)
    for a, b, c in zip(found, plain, exact(*given, terms)):
        rounding = float(jnp.finfo(a.dtype).eps) / 2 * largest(c)
        assert error(a, c) <= max(2 * error(b, c), 2 * rounding, 1e-5)


def test_pages_inside_shard_map():
    mesh, (q, k, v, lengths) = halves(), call([700, 90], 1, 8, 2, 16, 64, 64)

    def attend(q, k, v, table, lengths):
        terms = Terms(Causal(lengths - 1), scale=0.1)
        return HopperPages()(q, Paged(k, table), Paged(v, table), lengths, terms)

    specs = (P("data"), P(), P(), P("data"), P("data"))
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=P("data"))
    given = q, k.pages, v.pages, k.table, lengths
    for found, wanted in zip(jax.jit(sharded)(*given), jax.jit(attend)(*given)):
        np.testing.assert_allclose(
            *(np.asarray(x, np.float32) for x in (found, wanted)), rtol=1e-2, atol=1e-3
        )
