"""The Hopper kernel for caches in pages, interpreted, against float64 on pages that are copied together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from modicum import InputError
from modicum.models.kernels import ALiBi, Bucketed, Causal, Dense, Full, Keys, Paged, Terms, Window
from modicum.models.kernels.hopper import decoding
from modicum.models.kernels.hopper.decoding import HopperPages
from modicum.models.kernels.paged import DECODERS, Gathered
from modicum.models.kernels.request import Request, request_of

from ..cases import error, largest

INTERPRETED = HopperPages(interpret=InterpretGPUParams(detect_races=True), blocks=4, least_keys=64)


def call(lengths, queries, heads, groups, page, room, width=64):
    """Queries, and pages in random order; beyond a row's length there are no numbers and no pages."""
    rng, lengths = np.random.default_rng((queries, groups)), np.asarray(lengths)
    table = rng.permutation(len(lengths) * room).reshape(-1, room)
    pools = [np.full((table.size, page, groups, width), np.nan, np.float32) for _ in range(2)]
    for b, length in enumerate(lengths):
        for s in range(length):
            for pool in pools:
                pool[table[b, s // page], s % page] = rng.normal(size=pool.shape[2:])
        table[b, -(-length // page) :] = rng.choice([-1, 10**6, 0])
    q = jnp.asarray(rng.normal(size=(len(lengths), queries, heads, width)), jnp.bfloat16)
    table = jnp.asarray(table, jnp.int32)
    return q, *(Paged(jnp.asarray(pool, q.dtype), table) for pool in pools), jnp.asarray(lengths, jnp.int32)


def exact(q, k, v, lengths, terms):
    """What XLA computes in float64 of pages that it copies together."""
    with jax.enable_x64(True):
        double = jax.tree.map(
            lambda x: np.asarray(x, np.float64) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x,
            (q, k, v, lengths, terms),
        )
        return [np.asarray(x) for x in Gathered()(*jax.tree.map(jnp.asarray, double))]


def check(given, terms, how=INTERPRETED):
    """No race, and no more than twice the error that XLA makes in the same type."""
    gpu_callbacks.reset_gpu_interpret_mode_state()
    assert (
        how.supports(dataclasses.replace(request_of(*given[:3], terms, True), page=given[1].pages.shape[1]))
        is None
    )
    found, plain, wanted = how(*given, terms), Gathered()(*given, terms), exact(*given, terms)
    assert not gpu_callbacks.get_races().races_found
    assert found[0].dtype == given[0].dtype and found[1].dtype == jnp.float32
    for a, b, c in zip(found, plain, wanted):
        rounding = float(jnp.finfo(a.dtype).eps) / 2 * largest(c)
        assert error(a, c) <= max(2 * error(b, c), 2 * rounding, 1e-5)
    return found


@pytest.mark.usefixtures("quick_compile")
def test_split_keys_of_small_pages_behind_a_window_with_soft_cap_and_sinks():
    """The first row begins in its third tile and ends in the middle of its fourth; the second has no keys."""
    given = call([217, 0], 2, 3, 1, page=32, room=8)
    terms = Terms(Window(80, 0, given[3] - 2), scale=0.3, soft_cap=2.0, sinks=jnp.arange(3.0))
    out, lse = check(given, terms)
    assert (out[1] == 0).all() and (lse[1] == jnp.arange(3.0)[:, None]).all()


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
def test_large_pages_and_more_rows_than_a_block_with_alibi_and_hidden_keys():
    given = call([200], 17, 8, 2, page=128, room=2)
    flags = jnp.asarray(np.arange(256) % 5 != 0)[None]
    start = given[3] - 17
    bias = ALiBi(jnp.linspace(0.1, 0.5, 8), start)
    check(given, Terms(Causal(start) & Keys(flags), bias, scale=0.2))


REQUEST = Request("cpu", 2, 1, 256, 4, 2, 64, 64, "bfloat16", Full(), None, False, page=16)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "bfloat16 or float16, not float32"),
        ({"width": 32}, "both 64 or both 128 wide, not 32 and 64"),
        ({"page": 48}, "a multiple of 64 keys, not 48"),
        ({"queries": 256}, "512 rows, more than 256"),
        ({"mask": Dense(np.ones((1, 1, 1, 256), bool))}, "Dense does not show each query one range"),
        ({"bias": Bucketed(np.ones((8, 4), np.float32))}, "Bucketed"),
    ],
)
def test_what_it_cannot_do_it_names(changes, reason):
    assert INTERPRETED.supports(REQUEST) is None
    assert reason in INTERPRETED.supports(dataclasses.replace(REQUEST, **changes))


def test_it_is_for_hopper_gpus_and_chosen_before_copies():
    names = [decoder.name for decoder in DECODERS]
    assert names.index("hopper") < names.index("gathered")
    assert HopperPages().supports(REQUEST) == "it is for Hopper GPUs, and this is a cpu"
    assert HopperPages().unfit(dataclasses.replace(REQUEST, partitioned=True))


def test_numbers_of_several_types_are_refused():
    q, k, v, lengths = call([40], 1, 2, 2, page=16, room=4)
    with pytest.raises(InputError, match="bfloat16 queries on pages of float32 keys and bfloat16 values"):
        INTERPRETED(q, Paged(k.pages.astype("float32"), k.table), v, lengths, Terms(Full()))


def test_its_gradient_is_that_of_gathered_pages(monkeypatch):
    """Whatever the kernel found: its place is taken here, as no gradient comes from it."""
    monkeypatch.setattr(decoding, "_attend", lambda how, *given: Gathered()(*given))
    given = call([40], 1, 2, 2, page=16, room=4)
    terms = Terms(Causal(given[3] - 1), scale=0.3)

    def pulled(how):
        _, pull = jax.vjp(lambda q: how(q, *given[1:], terms), given[0])
        return pull((given[0], jnp.zeros((1, 2, 1), jnp.float32)))[0]

    np.testing.assert_array_equal(pulled(INTERPRETED), pulled(Gathered()))
