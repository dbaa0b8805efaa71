"""What a GPU has to reach, told from timings that are made up; and the program as far as a CPU runs it."""

import dataclasses

import pytest

from modicum.experiments.bench import attention_gpu
from modicum.experiments.bench.attention import Seen, Timed
from modicum.experiments.bench.attention_bundled import bundled
from modicum.experiments.bench.attention_gpu import CUDNN, OURS, Case, cases, gate_table, gates
from modicum.experiments.bench.attention_jax import JaxAttention
from modicum.experiments.bench.attention_job import AttentionJob

PLANNED = {case.name: case for case in cases()}


def seen(case: Case, **walls: tuple[float, float]) -> Seen:
    """Forward, and forward and backward, of each contender: the same at all lengths."""
    names = {"ours": OURS, "cudnn": CUDNN}
    timed = [
        Timed(names[who], length, backward, None, wall=[time, time / 2, 2 * time])
        for who, times in walls.items()
        for length in case.lengths
        for backward, time in enumerate(times)
    ]
    return Seen(case.job, [dataclasses.replace(t, backward=bool(t.backward)) for t in timed])


def verdicts(name: str, **found: Seen) -> dict[str, tuple[float | None, str]]:
    return {g.what: (g.found, g.verdict) for g in gates(found, [PLANNED[name]])}


def test_speed_is_held_against_cudnn_in_each_pass():
    case = PLANNED["causal-128"]
    found = verdicts(case.name, **{case.name: seen(case, ours=(1.0, 4.0), cudnn=(0.9, 3.0))})
    assert found["forward, of cuDNN's speed"] == (0.9, "pass")
    assert found["backward, of cuDNN's speed"] == (pytest.approx(2.1 / 3), "miss")


def test_with_a_dense_bias_it_is_to_be_twice_as_fast():
    case = PLANNED["dense-128"]
    found = verdicts(case.name, **{case.name: seen(case, ours=(1.0, 2.0), cudnn=(2.5, 4.0))})
    assert found == {"forward, times cuDNN": (2.5, "pass"), "backward, times cuDNN": (1.5, "miss")}


def test_masks_are_held_against_what_their_live_tiles_would_take():
    full, window = PLANNED["full-128"], PLANNED["window-128"]
    job = dataclasses.replace(window, lengths=(4096,))
    live = job.job.live_fraction(4096)
    found = {"full-128": seen(full, ours=(1.0, 3.0)), "window-128": seen(job, ours=(live / 0.7, 9.0))}
    gate, _ = gates(found, [job])
    assert gate.found == pytest.approx(0.7) and gate.verdict == "miss"


def test_what_was_not_measured_is_neither_passed_nor_missed():
    table = gate_table(list(gates({}, PLANNED.values())))
    assert {row[-1] for row in table.rows} == {"not measured"}
    assert {row[0] for row in table.rows} >= {"causal-128", "dense-128", "window-128", "packed-128"}


def test_it_writes_cases_and_goes_on_without_those_that_cannot_be(monkeypatch, tmp_path):
    monkeypatch.setattr(attention_gpu, "SLOW", ("plain softmax", "jax.nn"))
    small = AttentionJob(heads=2, kv_heads=1, width=8)
    planned = [Case("nobody", small, ()), Case("small", small, (32,)), Case("late", small, (32,))]
    said: list[str] = []
    clock = iter((0.0, 1.0, 2.0, 3.0, 100.0, *range(101, 200)))
    monkeypatch.setattr(attention_gpu.time, "monotonic", lambda: next(clock))
    found = attention_gpu.measure_all(tmp_path, 1, 2, planned, said.append)
    assert list(found) == ["small"] and (tmp_path / "small" / "summary.md").exists()
    assert (tmp_path / "gates.md").exists()
    assert "nobody: " in said[0] and "1 minutes are over; not measured: late" in said[-1]


def test_kernels_of_others_are_left_out_with_their_reason():
    assert set(bundled(AttentionJob(mask="causal"))) == {"Pallas Triton", "Pallas Mosaic, float16"}
    assert not bundled(AttentionJob(mask="window")) and not bundled(AttentionJob(heads=8, kv_heads=2))
    given = JaxAttention(AttentionJob(heads=2, kv_heads=2, width=8)).prepare("jax.nn cuDNN", 24, False)
    assert set(given) == {"left_out"} and "\n" not in given["left_out"]
