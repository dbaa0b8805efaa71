"""Attention on pages that are read in place, interpreted on the CPU, against float64 on gathered pages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from modicum.models.kernels import (
    ALiBi,
    Bucketed,
    Causal,
    Dense,
    Full,
    Keys,
    Lengths,
    Paged,
    Prefix,
    Segments,
    Terms,
    Window,
    alibi_slopes,
)
from modicum.models.kernels.paged import DECODERS, Gathered, choose_decoder
from modicum.models.kernels.request import request_of
from modicum.models.kernels.tpu.decoding import Pages
from modicum.models.kernels.tpu.schedule import Schedule, schedule

from ..cases import FAST_COMPILE, error, largest

PAGE, ROOM = 4, 5
SCHEDULE = jax.jit(schedule, static_argnums=(2, 3))
SMALL = Pages(interpret=True, block=16, unrolled=2)


def call(lengths, queries, heads, groups, dtype=jnp.float32, width=16, value_width=8):
    """Queries, and pages in random order; beyond a row's length there are no numbers and no pages."""
    rng, lengths = np.random.default_rng((queries, groups)), np.asarray(lengths)
    table = rng.permutation(len(lengths) * ROOM).reshape(-1, ROOM)
    pools = [np.full((table.size, PAGE, groups, n), np.nan, np.float32) for n in (width, value_width)]
    for b, length in enumerate(lengths):
        for s in range(length):
            for pool in pools:
                pool[table[b, s // PAGE], s % PAGE] = rng.normal(size=pool.shape[2:])
        table[b, -(-length // PAGE) :] = rng.choice([-1, 10**6, 0])
    q = jnp.asarray(rng.normal(size=(len(lengths), queries, heads, width)), dtype)
    table = jnp.asarray(table, jnp.int32)
    return q, *(Paged(jnp.asarray(pool, dtype), table) for pool in pools), jnp.asarray(lengths, jnp.int32)


def exact(q, k, v, lengths, terms):
    """What XLA computes in float64 of pages that it copies together."""
    with jax.enable_x64(True):
        double = jax.tree.map(
            lambda x: np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            (q, k, v, lengths, terms),
        )
        return [np.asarray(x) for x in Gathered()(*jax.tree.map(jnp.asarray, double))]


def computed(given, terms, how=SMALL):
    return jax.jit(how.__call__, compiler_options=FAST_COMPILE)(*given, terms)


def check(given, terms, how=SMALL):
    found, wanted = computed(given, terms, how), exact(*given, terms)
    assert found[0].dtype == given[0].dtype and found[1].dtype == jnp.float32
    for a, b in zip(found, wanted):
        assert error(a, b) <= 1e-5 * max(1, largest(b))
    return found


def test_a_row_alone_behind_its_window_with_soft_cap():
    lengths = [9, 0, 20, 3, 17]  # an odd number of rows: one part
    given = call(lengths, 3, 4, 2)
    out, lse = check(given, Terms(Window(4, 0, given[3] - 3), scale=0.3, soft_cap=2.0))
    assert (out[1] == 0).all() and (lse[1] == -jnp.inf).all()


def test_all_rows_in_two_parts_with_alibi_and_sinks():
    """The last row of a part, and the first, have no keys."""
    given = call([7, 0, 0, 20], 1, 4, 4)
    start = given[3] - 1
    bias = ALiBi(jnp.asarray(alibi_slopes(4)), start)
    out, lse = check(given, Terms(Causal(start), bias, sinks=jnp.arange(4.0), scale=0.3))
    assert (out[1] == 0).all() and (lse[1, :, 0] == jnp.arange(4.0)).all()


def test_one_key_head_in_bfloat16_errs_no_more_than_twice_what_xla_does():
    given = call([5, 18], 2, 3, 1, jnp.bfloat16)
    terms = Terms(Prefix(jnp.asarray([3, 10]), given[3] - 2) & Lengths(16), scale=0.3)
    found, plain, wanted = computed(given, terms), Gathered()(*given, terms), exact(*given, terms)
    for a, b, c in zip(found, plain, wanted):
        rounding = float(jnp.finfo(a.dtype).eps) / 2 * largest(c)
        assert error(a, c) <= max(2 * error(b, c), 2 * rounding, 1e-5)


def test_no_race():
    """Two cores, and copies that are done only when they are waited for: what is early reads no number."""
    watched = dataclasses.replace(
        SMALL, interpret=pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    )
    given = call([9, 0, 14, 20], 1, 2, 2)
    pltpu.reset_tpu_interpret_mode_state()
    check(given, Terms(Causal(given[3] - 1), scale=0.3), watched)
    assert not interpret_pallas_call.races.races_found
    pltpu.reset_tpu_interpret_mode_state()


def test_its_gradient_is_that_of_gathered_pages():
    given = call([5, 0], 1, 2, 2)
    terms = Terms(Causal(given[3] - 1), scale=0.3)

    def gradients(how):
        loss = lambda q, sinks: how(q, *given[1:], dataclasses.replace(terms, sinks=sinks))[0].sum()  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1)), compiler_options=FAST_COMPILE)(given[0], jnp.arange(2.0))

    found, wanted = gradients(SMALL), gradients(Gathered())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)
    assert abs(found[0]).max() > 0


@settings(max_examples=30, deadline=None, database=None, derandomize=True)
@given(
    rows=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=6, max_size=6),
    splits=st.sampled_from([1, 2]),
)
def test_each_block_is_asked_for_once_and_buffers_take_turns(rows, splits):
    """The schedule, walked as the kernel walks it."""
    starts, ends = (np.asarray(x).reshape(-1, 1) for x in zip(*rows))
    order = [np.asarray(x) for x in SCHEDULE(starts, ends, 8, splits)]
    order = dict(zip(Schedule._fields, order))
    for part in np.array_split(np.arange(len(rows)), splits):
        wanted = [
            (b, block)
            for b in part
            if starts[b] < ends[b]
            for block in range(int(starts[b, 0]) // 8, -(-int(ends[b, 0]) // 8))
        ]
        asked, slots = [], []
        for b in part:
            begin, stop = order["begin"][b], order["stop"][b]
            if order["leads"][b]:
                asked.append((b, begin))
            for block in range(begin, stop):
                slots.append((order["parity"][b] + block - begin) % 2)
                after = order["following"][b] if block + 1 == stop else b
                if after >= 0:
                    asked.append((after, order["begin"][after] if block + 1 == stop else block + 1))
        assert asked == wanted and slots == [i % 2 for i in range(len(wanted))]


def test_what_it_cannot_do_has_a_reason():
    q, k, v, lengths = call([9, 20], 1, 2, 2)
    terms = Terms(Causal(lengths - 1))
    request = dataclasses.replace(request_of(q, k, v, terms, True), page=PAGE, platform="tpu")
    change = lambda **changes: dataclasses.replace(request, **changes)  # noqa: E731
    supports, unfit = Pages().supports, Pages().unfit
    assert supports(request) is None and unfit(change(width=128, value_width=128, partitioned=False)) is None
    assert supports(change(platform="gpu")) == "it is for TPUs, not gpu"
    assert "not float16" in supports(change(dtype="float16"))
    assert "Bucketed bias" in supports(change(bias=Bucketed(np.ones((8, 2)))))
    assert "512 rows, more than 256" in supports(change(heads=512))
    assert "scalar memory" in supports(change(batch=1024, keys=1024))
    assert "64 MiB" in supports(change(page=512, kv_heads=32, width=256, value_width=256))
    assert "one range" in supports(change(mask=Dense(np.ones((1, 1, 1, 20), bool))))
    for mask in (Keys(np.ones((2, 20), bool)), Segments(np.ones((2, 1), int), np.ones((2, 20), int))):
        assert "compares ids" in supports(change(mask=mask & Full()))
    assert "partition" in unfit(change(partitioned=True))
    assert "5 key heads would be copied" in unfit(change(kv_heads=5, partitioned=False))
    assert "16 wide would be copied" in unfit(change(partitioned=False))


def test_it_stands_before_the_copy():
    assert [each.name for each in DECODERS] == ["tpu", "hopper", "gathered"]
    q, k, v, lengths = call([9, 20], 1, 2, 2, width=128, value_width=128)
    request = request_of(q, k, v, Terms(Causal(lengths - 1)), True)
    request = dataclasses.replace(request, page=PAGE, platform="tpu", partitioned=False)
    assert choose_decoder(request, "auto").name == "tpu"
    assert choose_decoder(dataclasses.replace(request, platform="cpu"), "auto").name == "gathered"
