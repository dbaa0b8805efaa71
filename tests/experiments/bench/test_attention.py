"""`modicum bench attention` from the command's dataclass to the files it writes."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.experiments.bench.attention import Seen, Timed, measure_rounds
from modicum.experiments.bench.attention_jax import JaxAttention
from modicum.experiments.bench.attention_job import BIASES, MASKS, AttentionJob
from modicum.experiments.bench.attention_report import summary, times_table
from modicum.experiments.bench.worker import attended, measure
from modicum.experiments.commands.bench_attention import AttentionBench
from modicum.models.kernels.spans import Span

TINY = {"lengths": (32,), "width": 8, "heads": 2, "kv_heads": 1, "window": 5, "documents": 3, "rounds": 2}


@pytest.mark.parametrize("mask", MASKS)
def test_pairs_and_tiles_are_counted_as_the_mask_has_them(mask):
    job, length = AttentionJob(batch=2, heads=4, kv_heads=2, width=8, mask=mask, window=150, documents=3), 600
    expression = JaxAttention(job).mask(length)
    seen = np.asarray(expression.predicate(Span(0, length), Span(0, length)))[0, 0]
    assert job.flops(length, backward=False) == 4 * 2 * 4 * 8 * seen.sum()
    assert job.flops(length, backward=True) == 14 * 2 * 4 * 8 * seen.sum()
    padded = np.pad(seen, (0, 640 - length)).reshape(5, 128, 5, 128).any((1, 3))
    assert job.live_fraction(length) == pytest.approx(padded.mean())


@pytest.mark.parametrize(
    ("mask", "bias"),
    [(m, b) for i, m in enumerate(MASKS) for j, b in enumerate(BIASES) if (i + j) % 2 == 0],
)
def test_contenders_compute_the_same(mask, bias):
    contender = JaxAttention(AttentionJob(heads=2, kv_heads=1, width=8, mask=mask, bias=bias, window=5))
    names = [name for name, reason in contender.contenders(24).items() if not reason]
    assert {"chunked", "plain softmax", "jax.nn"} <= set(names)
    samples = []
    for name in names:
        assert contender.prepare(name, 24, backward=False)["temporary"] >= 0
        samples.append(contender.sample(contender.attend(name, backward=False)))
    np.testing.assert_allclose(samples, samples[:1] * len(samples), atol=1e-5)


@pytest.mark.slow
def test_the_command_writes_its_table_and_every_timing(capsys, tmp_path):
    assert AttentionBench(**TINY, without=("SDPA", "plain softmax"), out=tmp_path).run() == 0
    printed = capsys.readouterr().out
    assert "B=1 H=2 G=1 K=8 float32, mask causal" in printed and "Without cudnn: it runs on NVIDIA" in printed
    run, *lines = map(json.loads, (tmp_path / "attention.jsonl").read_text().splitlines())
    assert run["job"]["kv_heads"] == 1 and {line["contender"] for line in lines} == {
        "whole",
        "chunked",
        "jax.nn",
    }
    assert all(len(line["wall"]) == 2 and min(line["wall"]) > 0 and line["apart"] < 1e-4 for line in lines)
    assert {line["backward"] for line in lines} == {True, False}
    assert (tmp_path / "attention.csv").read_text().startswith("length,attention,f ms,f+b ms")


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.parametrize(("mask", "bias"), [("causal", "none"), ("packed", "bucketed"), ("full", "alibi")])
def test_sdpa_computes_the_same(mask, bias):
    torch = pytest.importorskip("torch")
    from modicum.experiments.bench.attention_torch import TorchAttention

    job = AttentionJob(heads=2, kv_heads=1, width=8, mask=mask, bias=bias)
    ours, theirs = JaxAttention(job), TorchAttention(job, on_cpu=True)
    for contender, name in ((ours, "chunked"), (theirs, "SDPA")):
        contender.prepare(name, 32, backward=True)
    (out, gradients), found = ours.attend("chunked", True), theirs.attend("SDPA", True)
    np.testing.assert_allclose(ours.sample((out,)), theirs.sample(found), atol=1e-5)
    assert isinstance(found[1][0], torch.Tensor)
    for a, b in zip(gradients[:3], found[1]):
        np.testing.assert_allclose(a, b.transpose(1, 2), atol=1e-4)


class Scripted:
    """A worker whose contenders take given seconds, or more memory than there is."""

    def __init__(self, seconds):
        self.seconds, self.calls = seconds, []

    def ask(self, what, **given):
        match what:
            case "contenders":
                return dict.fromkeys(self.seconds, "") | {"other": "it cannot"}
            case "prepare":
                return (
                    {"temporary": 0}
                    if self.seconds[given["name"]] != "compiling"
                    else {"left_out": "too full"}
                )
            case "attend":
                self.calls.append((given["name"], given["calls"]))
                seconds = self.seconds[given["name"]]
                return (
                    {"sample": [1.0, seconds], "wall": seconds, "cpu": seconds}
                    if seconds
                    else {"left_out": "full"}
                )


def test_short_calls_are_repeated_and_who_has_no_memory_left_is_left_out():
    seen, worker = (
        Seen(AttentionJob()),
        Scripted({"slow": 0.5, "fast": 1e-3, "large": 0, "vast": "compiling"}),
    )
    measure_rounds(seen, [worker], 64, False, rounds=2, report=lambda line: None)
    assert [timed.contender for timed in seen.timed] == ["slow", "fast"]
    assert [len(timed.wall) for timed in seen.timed] == [2, 2]
    assert seen.left_out == {"other": "it cannot", "large at 64": "full", "vast at 64": "too full"}
    assert seen.timed[1].apart == pytest.approx(0.499)
    assert [calls for name, calls in worker.calls if name == "fast"] == [1, 20, 20]
    assert [calls for name, calls in worker.calls if name == "slow"] == [1, 1, 1]
    assert [name for name, _ in worker.calls].count("large") == 1
    with pytest.raises(InputError, match="nobody is left to measure at length 64"):
        measure_rounds(
            Seen(AttentionJob(), without=("slow", "fast", "large", "vast")), [worker], 64, False, 2, print
        )


def test_memory_that_is_not_enough_is_told_and_other_errors_are_raised():
    class Failing:
        def attend(self, error, calls):
            raise RuntimeError(error)

        def prepare(self, error):
            raise RuntimeError(error)

    assert measure(Failing(), "prepare", error="RESOURCE_EXHAUSTED: 99 GB") == {
        "left_out": "it is out of memory"
    }
    with pytest.raises(RuntimeError, match="a bug"):
        measure(Failing(), "prepare", error="a bug")
    assert attended(Failing(), 1, error="RESOURCE_EXHAUSTED: 12 GB") == {"left_out": "it is out of memory"}
    assert attended(Failing(), 1, error="CUDA out of memory") == {"left_out": "it is out of memory"}
    with pytest.raises(RuntimeError, match="a bug"):
        attended(Failing(), 1, error="a bug")


def test_rates_are_of_medians():
    job = AttentionJob(heads=2, kv_heads=2, width=8)
    flops = 4 * 2 * 8 * (16 * 17 / 2)
    timed = Timed("chunked", 16, False, 2 << 20, wall=[1.0, 4e-3, 2e-3], cpu=[3e-3, 1e-3, 2e-3])
    seen = Seen(job, [timed], {"tpu": "no"}, ["jax"], [0.0, 0.0])
    assert times_table(seen).rows == ((16, "chunked", 4.0, 2.0, float(f"{flops / 4e-3 / 1e9:.3g}"), 2.0),)
    assert "Without tpu: no." in summary(seen) and "f GFLOP/s" in times_table(seen).columns
    timed.wall[:] = [1e-9]
    assert "f TFLOP/s" in times_table(seen).columns


def test_tuning_writes_what_chunked_reads(tmp_path, monkeypatch, capsys):
    from modicum.models.kernels import Causal, Terms, block_sizes
    from modicum.models.kernels.chunked import Chunked

    path = tmp_path / "sizes.json"
    monkeypatch.setattr(Chunked, "candidates", lambda self, request: {"chunked": [(8, 16), (16, 8)]})
    assert AttentionBench(**{**TINY, "rounds": 1}, tune=True, table=path).run() == 0
    entry = next(
        entry for entry in json.loads(path.read_text()) if entry["chip"] == "cpu" and entry["length"] == 32
    )
    assert entry["blocks"] in ([8, 16], [16, 8])
    assert (entry["dtype"], entry["width"], entry["mask"]) == ("float32", 32, "causal")
    told = capsys.readouterr().err
    assert "chunked at 32, ms: 8x16" in told and "tpu: it is for TPUs, not cpu; its blocks stay" in told
    monkeypatch.setattr(block_sizes, "entries", lambda: tuple(json.loads(path.read_text())))
    q = jnp.ones((1, 32, 2, 8))
    assert Chunked()._targets(q, q, Terms(Causal())) == tuple(entry["blocks"])


def test_where_nothing_can_be_timed_the_table_stays_as_it_is(tmp_path):
    path = tmp_path / "sizes.json"
    with pytest.raises(InputError, match="nothing on this platform takes block sizes"):
        AttentionBench(**TINY, tune=True, table=path, without=("chunked",)).run()
    with pytest.raises(InputError, match="bias=alibi: entries would be taken without a bias too"):
        AttentionBench(**TINY, tune=True, table=path, bias="alibi").run()
    assert not path.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3, "kv_heads": 2}, "heads=3 is not a multiple of kv_heads=2"),
        ({"lengths": (1,)}, "at least 2"),
        ({"rounds": 0}, "rounds=0 must be at least 1"),
        ({"window": -1}, "window=-1 must be at least 0"),
        ({"width": 0}, "width=0 must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_named(options, message):
    with pytest.raises(InputError, match=message):
        AttentionBench(**options).run()
