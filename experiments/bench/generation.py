"""Measure generation of all contenders, round by round, and how fast the machine reads its memory.

Prefill is the time to the first token of each row; decoding is what more tokens take. At batch 1 a decoder
reads each of its weights once a token and does little else, so that their bytes over the memory's rate
bound the time of a token from below.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from ... import InputError
from .generation_job import MATRIX, GenerationJob
from .processes import Worker
from .training import check

ContenderName = Literal["ours", "transformers"]
LABELS: dict[ContenderName, str] = {"ours": "Modicum", "transformers": "transformers"}
Report = Callable[[str], None]
Key = tuple[str, int]


@dataclass(frozen=True)
class Entrant:
    """Who generates what: a contender, its job, and the bytes of weights that a decoded token has to read."""

    contender: ContenderName
    job: GenerationJob
    weights: int


@dataclass(frozen=True)
class Seen:
    """What one run of the benchmark saw, by the entrants' labels; the first is what others are compared with.

    `rounds[label, batch]` has for each round the seconds `first` (to the first token) and `token` (of one
    more token in each row). `reads[label]` are bytes a second of a matrix-vector product in each round.
    `equal[batch]` is the share of tokens that agree with the first entrant's.
    """

    entrants: Mapping[str, Entrant]
    rounds: dict[Key, list[dict[str, float]]] = field(default_factory=dict)
    reads: dict[str, list[float]] = field(default_factory=dict)
    equal: dict[int, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    load: list[float] = field(default_factory=list)

    @property
    def job(self) -> GenerationJob:
        """That of the first entrant; all have the same lengths."""
        return next(iter(self.entrants.values())).job

    def seconds(self, key: Key, what: str) -> float:
        """Median over the rounds."""
        return median(one[what] for one in self.rounds[key])

    def advantage(self, key: Key, what: str) -> float:
        """How many times as long as the first entrant's it takes: the median over the rounds."""
        first = self.rounds[next(iter(self.entrants)), key[1]]
        return median(own[what] / base[what] for base, own in zip(first, self.rounds[key]))

    def of_bound(self, key: Key) -> float:
        """Which part of the memory's rate reading the weights once a token reaches, median over the rounds.

        The rate is that of the better library's matrix-vector product in the same round.
        """
        rates = [max(each) for each in zip(*self.reads.values())]
        weights = self.entrants[key[0]].weights
        return median(weights / one["token"] / rate for one, rate in zip(self.rounds[key], rates))


def measure_generation(
    entrants: Mapping[str, Entrant],
    *,
    batches: Sequence[int],
    rounds: int,
    threads: int = 0,
    report: Report = print,
) -> Seen:
    """Warm every entrant up, then let them take turns. Raises `InputError` for counts below 1."""
    check(rounds=rounds, entrants=len(entrants), batches=len(batches), batch=min(batches, default=1))
    seen = Seen(entrants, load=[os.getloadavg()[0]])
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for label, entrant in entrants.items():
            report(f"{label}: loading and compiling")
            worker = Worker(f"{entrant.contender}-generation", entrant.job, threads)
            workers[label] = stack.enter_context(worker)
            seen.versions[LABELS[entrant.contender]] = worker.versions
        _compare(seen, workers, batches)
        for index in range(rounds):
            report(f"round {index + 1} of {rounds}")
            for label, worker in workers.items():
                seen.reads.setdefault(label, []).append(_rate(worker))
                for batch in batches:
                    seen.rounds.setdefault((label, batch), []).append(_round(worker, batch, seen.job.new))
    seen.load.append(os.getloadavg()[0])
    return seen


def _compare(seen: Seen, workers: Mapping[str, Worker], batches: Sequence[int]) -> None:
    """Generate once with each, which also compiles, and compare the tokens of who has the same job."""
    for batch in batches:
        made = {
            label: worker.ask(what="generate", batch=batch, new=seen.job.new + 1)["tokens"]
            for label, worker in workers.items()
            if worker.ask(what="generate", batch=batch, new=1)
        }
        first, *others = (made[label] for label, each in seen.entrants.items() if each.job == seen.job)
        pairs = [(a, b) for other in others for x, y in zip(first, other) for a, b in zip(x, y)]
        if pairs:
            seen.equal[batch] = sum(a == b for a, b in pairs) / len(pairs)


def _round(worker: Worker, batch: int, new: int) -> dict[str, float]:
    first = worker.ask(what="generate", batch=batch, new=1)["wall"]
    more = worker.ask(what="generate", batch=batch, new=new + 1)["wall"]
    return {"first": first, "token": (more - first) / new}


def _rate(worker: Worker) -> float:
    return 4 * MATRIX[0] * MATRIX[1] / worker.ask(what="read")["wall"]


def require_peers(contenders: Sequence[ContenderName]) -> None:
    """Raise `InputError` where transformers takes part and is not installed."""
    if "transformers" in contenders and importlib.util.find_spec("transformers") is None:
        raise InputError("transformers is not installed; pip install 'modicum[peers]'")
