import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from modicum import InputError
from modicum.models.kernels import Causal, Dropout, Full, Terms, attention, implementations, registry
from modicum.models.kernels.request import Request, request_of
from modicum.parallel import MeshShape, make_mesh

Q, KV = jnp.ones((2, 5, 4, 8)), jnp.ones((2, 7, 2, 8))


@pytest.fixture
def log(caplog):
    registry.choose.cache_clear()
    caplog.set_level(logging.INFO, logger="modicum.kernels")
    return caplog


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        (
            Q,
            KV[:, :, :, :4],
            KV,
            r"q \[2, 5, 4, 8\] and k \[2, 7, 2, 4\] must have one batch size and one width",
        ),
        (Q, KV[:1], KV[:1], "one batch size"),
        (Q[:, :, :3], KV, KV, "q has 3 heads, which k's 2 heads do not divide"),
        (Q, KV, KV[:, :6], r"k \[2, 7, 2, 8\] and v \[2, 6, 2, 8\] must agree"),
        (Q[0], KV, KV, r"q has shape \[5, 4, 8\]"),
        (Q, KV, KV.astype(jnp.bfloat16), "v has type bfloat16"),
        (Q.astype(int), KV.astype(int), KV.astype(int), "q has type int32"),
    ],
)
def test_shapes_and_types_that_do_not_fit_are_named(q, k, v, message):
    with pytest.raises(InputError, match=message):
        attention(q, k, v, mask=Full())


@pytest.mark.parametrize("option", [{"scale": -1.0}, {"soft_cap": 0.0}, {"scale": jnp.ones(())}], ids=str)
def test_numbers_are_positive_and_static(option):
    with pytest.raises(InputError, match=f"{next(iter(option))} is .*positive Python number"):
        attention(Q, KV, KV, mask=Full(), **option)


@pytest.mark.parametrize("sinks", [jnp.zeros(2), jnp.zeros((4, 1)), jnp.zeros(4, int)], ids=str)
def test_a_sink_is_a_logit_a_head(sinks):
    with pytest.raises(InputError, match=r"sinks are .*they must be floating \[4\]"):
        attention(Q, KV, KV, mask=Full(), sinks=sinks)


def test_unknown_implementation_lists_the_valid_ones():
    with pytest.raises(
        InputError, match=r"impl='flash' is unknown; valid are auto, .*whole, .*chunked, .*reference, .*cudnn"
    ):
        attention(Q, KV, KV, mask=Full(), impl="flash")


def test_a_forced_implementation_that_cannot_says_why(monkeypatch):
    class Never:
        name = "never"

        def supports(self, request):
            return f"it has no {request.dtype}"

    monkeypatch.setattr(registry, "IMPLEMENTATIONS", (Never(), *implementations()))
    registry.choose.cache_clear()
    with pytest.raises(InputError, match=r"impl='never' cannot compute .*: it has no float32 .*Causal"):
        attention(Q, KV, KV, mask=Causal(), impl="never")
    assert attention(Q, KV, KV, mask=Causal()).shape == Q.shape  # auto passes it over
    registry.choose.cache_clear()


def test_a_single_query_takes_the_plain_softmax_unless_tiles_are_asked_for(log):
    q, mask = Q[:, :1], Full()
    np.testing.assert_allclose(
        attention(q, KV, KV, mask=mask, impl="chunked"), attention(q, KV, KV, mask=mask), atol=1e-6
    )
    assert "chunked, as asked for" in log.text
    assert "reference; not whole: a single query needs no" in log.text
    assert "not chunked: a single query needs no tiles" in log.text


@pytest.mark.parametrize(
    ("length", "options", "chosen"),
    [
        (128, {}, "Full: whole"),
        (129, {}, "Full: chunked; not whole: it keeps the probabilities, which is for lengths up to 128"),
        (5, {"soft_cap": 2.0}, "soft cap: chunked; not whole: it has no bias and no soft cap"),
        (5, {"bias": jnp.zeros((1, 1, 5, 5))}, "chunked; not whole: it has no bias and no soft cap"),
        (5, {"sinks": jnp.zeros(1)}, "Full, sinks: chunked; not whole: it has no sinks and no dropout"),
        (
            5,
            {"dropout": Dropout(0.1, np.uint32(0))},
            "Full, dropout 0.1: chunked; not whole: it has no sinks",
        ),
    ],
    ids=str,
)
def test_short_sequences_are_taken_whole(log, length, options, chosen):
    x = jnp.ones((1, length, 1, 2))
    attention(x, x, x, mask=Full(), **options)
    assert chosen in log.text


def test_the_choice_is_logged_once_a_request(log):
    step = jax.jit(lambda q: attention(attention(q, KV, KV, mask=Causal()), KV, KV, mask=Causal()))
    step(Q)
    assert [record.levelname for record in log.records] == ["INFO"]
    assert "B=2 T=5 S=7 H=4 G=2 K=8 float32 on cpu, Causal: whole" in log.text
    attention(Q, KV, KV, mask=Full(), impl="reference", soft_cap=2.0)
    assert len(log.records) == 2 and "Full, soft cap: reference, as asked for" in log.text


def test_requests_show_structure_but_no_numbers(log):
    seen = []
    for offset in (1, 2):
        attention(Q, KV, KV, mask=Causal(jnp.array(offset)), bias=jnp.zeros((1, 1, 5, 7)) + offset)
        seen.append(len(log.records))
    assert seen == [1, 1]
    assert Request.__hash__ is not None


@pytest.mark.parametrize("impl", ["whole", "chunked", "reference"])
def test_the_output_has_the_type_of_the_query_and_lse_is_wide(impl):
    for dtype, wide in ((jnp.bfloat16, jnp.float32), (jnp.float16, jnp.float32), (jnp.float32, jnp.float32)):
        q, kv = Q.astype(dtype), KV.astype(dtype)
        out, lse = attention(q, kv, kv, mask=Causal(), impl=impl, return_lse=True)
        assert (out.dtype, lse.dtype, lse.shape) == (dtype, wide, (2, 4, 5))
        np.testing.assert_allclose(np.asarray(out, np.float32), 1, rtol=1e-2)


def test_a_mask_given_as_bias_is_an_error():
    q = jnp.ones((1, 4, 2, 8))
    with pytest.raises(InputError, match="bias has type bool; it must be floating"):
        attention(q, q, q, mask=Full(), bias=jnp.ones((1, 1, 4, 4), bool))


def test_only_inside_shard_map_is_a_call_not_partitioned():
    q = jnp.ones((8, 4, 2, 8))
    seen = []

    def run(q):
        seen.append(request_of(q, q, q, Terms(Full()), False).partitioned)
        return q

    mesh = make_mesh(MeshShape(data=8))
    jax.jit(run)(q)
    jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(q)
    assert seen[0] and not seen[-1]
