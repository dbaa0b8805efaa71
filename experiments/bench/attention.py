"""Measure attention of all contenders, round by round, forward alone and with the backward pass."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ... import InputError
from .attention_job import AttentionJob
from .processes import Worker
from .training import check

Report = Callable[[str], None]
SHORTEST = 0.02
"""Seconds that a turn should take at least, by calling several times."""
MOST_CALLS = 100


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
    without: tuple[str, ...] = ()


def measure_attention(
    job: AttentionJob,
    *,
    lengths: Sequence[int],
    rounds: int,
    backward: bool = True,
    without: Sequence[str] = (),
    cpu: bool = False,
    threads: int = 0,
    report: Report = print,
) -> Seen:
    """Let all but those named in `without` take turns at each length.

    JAX and PyTorch have a process each; PyTorch may be missing.

    With one round nobody has a turn before it, so that long sequences can be measured on small machines.
    """
    check(rounds=rounds, lengths=len(lengths), length=min(lengths, default=1))
    seen = Seen(job, without=tuple(without), load=[os.getloadavg()[0]])
    kinds = ["jax"] if "SDPA" in without else ["jax", "torch"]
    if "torch" in kinds and not importlib.util.find_spec("torch"):
        kinds.remove("torch")
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
                measure_rounds(seen, workers, length, both, rounds, report)
    seen.load.append(os.getloadavg()[0])
    return seen


@dataclass
class Turn:
    """A contender that takes part at one length, in its process."""

    worker: Worker
    timed: Timed
    calls: int = 1
    sample: list[float] = field(default_factory=list)

    def take(self) -> dict[str, Any]:
        """One turn, of so many calls that its time is not that of the clock."""
        timed = self.timed
        given = {"name": timed.contender, "backward": timed.backward, "calls": self.calls}
        answer = self.worker.ask(what="attend", **given)
        if "left_out" not in answer:
            self.sample = answer["sample"]
            self.calls = min(MOST_CALLS, max(1, int(SHORTEST / max(answer["wall"], 1e-9))))
        return answer


def measure_rounds(
    seen: Seen, workers: Sequence[Worker], length: int, backward: bool, rounds: int, report: Report
) -> None:
    """Let the contenders of these processes take turns at one length, and add what they took to `seen`."""
    what = f"length {length}, {'forward and backward' if backward else 'forward'}"
    report(f"{what}: compiling")
    turns = [turn for worker in workers for turn in _enter(seen, worker, length, backward)]
    for index in range(rounds + (rounds > 1)):
        report(f"{what}: " + (f"round {index} of {rounds}" if index else "the first"))
        for turn in list(turns):
            answer = turn.take()
            if reason := answer.get("left_out"):
                seen.left_out[f"{turn.timed.contender} at {length}"] = reason
                turns.remove(turn)
            elif index or rounds == 1:
                turn.timed.wall.append(answer["wall"])
                turn.timed.cpu.append(answer["cpu"])
    if not turns:
        raise InputError(f"nobody is left to measure at length {length}: {seen.left_out or seen.without}")
    for turn in turns:
        turn.timed.apart = max(abs(a - b) for a, b in zip(turns[0].sample, turn.sample))
        seen.timed.append(turn.timed)
    for worker in workers:
        worker.ask(what="forget")


def _enter(seen: Seen, worker: Worker, length: int, backward: bool) -> Iterator[Turn]:
    """Who of a process takes part, compiled; reasons of others are kept."""
    for name, reason in worker.ask(what="contenders", length=length).items():
        if reason and name not in seen.without:
            seen.left_out[name] = reason
        elif name not in seen.without:
            ready = worker.ask(what="prepare", name=name, length=length, backward=backward)
            if reason := ready.get("left_out"):
                seen.left_out[f"{name} at {length}"] = reason
            else:
                yield Turn(worker, Timed(name, length, backward, ready["temporary"]))
