"""Measure attention of all contenders, round by round, forward alone and with the backward pass."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from .attention_job import AttentionJob
from .processes import Worker
from .training import check

Report = Callable[[str], None]


@dataclass
class Timed:
    """One contender at one length, with or without the backward pass."""

    contender: str
    length: int
    backward: bool
    temporary: int | None
    apart: float = 0.0
    """How far its output is from the first contender's, at some places."""
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def rate(self, job: AttentionJob) -> float:
        """TFLOP/s of the products that no implementation can avoid."""
        return job.flops(self.length, self.backward) / median(self.wall) / 1e12


@dataclass
class Seen:
    """What one run of the benchmark saw."""

    job: AttentionJob
    timed: list[Timed] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    versions: list[str] = field(default_factory=list)
    load: list[float] = field(default_factory=list)


def measure_attention(
    job: AttentionJob,
    *,
    lengths: Sequence[int],
    rounds: int,
    backward: bool = True,
    torch: bool = True,
    cpu: bool = False,
    threads: int = 0,
    report: Report = print,
) -> Seen:
    """Let all take turns at each length. JAX and PyTorch have a process each; PyTorch may be missing.

    With one round nobody has a turn before it, so that long sequences can be measured on small machines.
    """
    check(rounds=rounds, lengths=len(lengths), length=min(lengths, default=1))
    seen = Seen(job, load=[os.getloadavg()[0]])
    kinds = ["jax", *(["torch"] if torch and importlib.util.find_spec("torch") else [])]
    if torch and len(kinds) == 1:
        seen.left_out["SDPA"] = "torch is not installed; pip install 'modicum[peers]'"
    with ExitStack() as stack:
        workers = []
        for kind in kinds:
            name = "attention-torch-cpu" if cpu and kind == "torch" else f"attention-{kind}"
            worker = Worker(name, job, threads, platforms="cpu" if cpu else None)
            workers.append(stack.enter_context(worker))
            seen.versions.append(worker.versions)
        for length in lengths:
            for both in (False, True) if backward else (False,):
                _measure(seen, workers, length, both, rounds, report)
    seen.load.append(os.getloadavg()[0])
    return seen


def _measure(
    seen: Seen, workers: Sequence[Worker], length: int, backward: bool, rounds: int, report: Report
) -> None:
    what = "forward and backward" if backward else "forward"
    report(f"length {length}, {what}: compiling")
    entered: list[tuple[Worker, Timed, dict[str, Any]]] = []
    for worker in workers:
        for name, reason in worker.ask(what="contenders", length=length).items():
            if reason:
                seen.left_out[name] = reason
                continue
            given = {"name": name, "backward": backward}
            ready = worker.ask(what="prepare", length=length, **given)
            entered.append((worker, Timed(name, length, backward, ready["temporary"]), given))
    samples: dict[str, list[float]] = {}
    for index in range(rounds + (rounds > 1)):
        report(f"length {length}, {what}: " + (f"round {index} of {rounds}" if index else "the first"))
        for worker, timed, given in entered:
            answer = worker.ask(what="attend", **given)
            samples[timed.contender] = answer["sample"]
            if index or rounds == 1:
                timed.wall.append(answer["wall"])
                timed.cpu.append(answer["cpu"])
    base = samples[entered[0][1].contender]
    for _, timed, _ in entered:
        timed.apart = max(abs(a - b) for a, b in zip(base, samples[timed.contender]))
        seen.timed.append(timed)
    for worker in workers:
        worker.ask(what="forget")
