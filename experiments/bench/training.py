"""Measure the train steps of all contenders, round by round, and the machine's matrix products.

In every round each contender takes its turn, so that what else the machine does meets all of them alike;
ratios are taken within a round.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Literal, Protocol

from ... import InputError
from .job import DecoderJob
from .processes import Job, Worker

ContenderName = Literal["ours", "eager", "compiled"]
CONTENDERS: tuple[ContenderName, ...] = ("ours", "eager", "compiled")
LABELS = {
    "ours": "Modicum",
    "eager": "PyTorch eager",
    "compiled": "torch.compile",
    "ours-tuning": "Modicum",
    "ours-tuning-wide": "Modicum, last mlp of every token",
    "peft": "PyTorch + PEFT",
    "peft-compiled": "PyTorch + PEFT, compiled",
}
WARMUP = 3
SQUARE = (2048, 2048, 2048)
Clock = Literal["wall", "cpu"]
Report = Callable[[str], None]


class StepJob(Job, Protocol):
    """A job whose train step is measured."""

    @property
    def tokens(self) -> int:
        """Tokens of one step."""

    def products(self) -> Iterator[tuple[int, tuple[int, int, int]]]:
        """How often a step needs a matrix product, and its sizes (m, k, n)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a contender's process: ready to start; at most until warm; at most in a step after that."""

    loaded: int
    starting: int
    stepping: int


@dataclass(frozen=True)
class Measurements:
    """What one run of the benchmark saw; others are compared with the first contender.

    `rounds[name]` has for each round `wall` and `cpu` seconds of a step, and `loss`; `losses[name]` those of
    the first steps. `products[library]` has the best seconds of a product by its sizes, each under `wall` and
    `cpu`. `load` is the number of running processes, averaged over a minute, before and after.
    """

    job: StepJob
    flops: float
    rounds: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    products: dict[str, dict[tuple[int, int, int], dict[str, float]]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    load: list[float] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, Memory] = field(default_factory=dict)

    @property
    def first(self) -> str:
        """Whom the others are compared with."""
        return next(iter(self.rounds))

    def seconds(self, name: str, clock: Clock) -> float:
        """Median of a step."""
        return median(one[clock] for one in self.rounds[name])

    def advantage(self, name: str, clock: Clock) -> float:
        """How many times as long as the first one's its step takes: the median over the rounds."""
        pairs = zip(self.rounds[self.first], self.rounds[name])
        return median(theirs[clock] / ours[clock] for ours, theirs in pairs)

    def square_rate(self, library: str, clock: Clock) -> float:
        """FLOP/s of the product of two square matrices of 2048."""
        return product_flops(SQUARE) / self.products[library][SQUARE][clock]

    def shapes_rate(self, library: str, clock: Clock) -> float:
        """FLOP/s over the step's products without attention's, each weighted by how often a step has it."""
        times = self.products[library]
        flops = sum(count * product_flops(sizes) for count, sizes in self.job.products())
        return flops / sum(count * times[sizes][clock] for count, sizes in self.job.products())


def product_flops(sizes: tuple[int, int, int]) -> float:
    """Multiplications and additions of `[m, k] x [k, n]`."""
    m, k, n = sizes
    return 2.0 * m * k * n


def measure_training(
    job: DecoderJob,
    *,
    rounds: int,
    steps: int,
    contenders: Sequence[ContenderName] = CONTENDERS,
    threads: int = 0,
    report: Report = print,
) -> Measurements:
    """Warm every contender up, then let them take turns.

    Raises `InputError` where PyTorch is needed and absent, and for counts below 1.
    """
    check(rounds=rounds, steps=steps, contenders=len(contenders))
    require_peers(contenders)
    from ...models.costs import training_flops_per_token
    from .ours import decoder_config

    flops = training_flops_per_token(decoder_config(job), job.length) * job.tokens
    return measure_steps(
        job, flops, rounds=rounds, steps=steps, contenders=contenders, threads=threads, report=report
    )


def measure_steps(
    job: StepJob,
    flops: float,
    *,
    rounds: int,
    steps: int,
    contenders: Sequence[str],
    threads: int = 0,
    report: Report = print,
) -> Measurements:
    """Warm the contenders up, one after the other, then let them take turns; `flops` are those of a step."""
    seen = Measurements(job, flops, load=[os.getloadavg()[0]])
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name in dict.fromkeys(contenders):
            report(f"{LABELS[name]}: starting and compiling")
            workers[name] = stack.enter_context(Worker(name, job, threads))
            seen.losses[name] = [workers[name].round(1)["loss"] for _ in range(WARMUP)]
            seen.memory[name] = _memory(workers[name])
            seen.versions[LABELS[name]] = workers[name].versions
        libraries = {library_of(name): worker for name, worker in reversed(workers.items())}
        for index in range(rounds):
            report(f"round {index + 1} of {rounds}")
            for name, worker in workers.items():
                seen.rounds.setdefault(name, []).append(per_step(worker.round(steps), steps))
            for library, worker in libraries.items():
                keep_best(seen.products.setdefault(library, {}), worker, job)
    seen.load.append(os.getloadavg()[0])
    return seen


def _memory(worker: Worker) -> Memory:
    starting = worker.peak_memory()
    worker.round(1)
    return Memory(worker.loaded, starting, worker.peak_memory())


def check(**counts: int) -> None:
    """Raise `InputError` for a count below 1."""
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"{name}={value} must be at least 1")


def require_peers(contenders: Sequence[str]) -> None:
    """Raise `InputError` where a contender needs PyTorch and it is not installed."""
    if set(contenders) - {"ours"} and importlib.util.find_spec("torch") is None:
        raise InputError("PyTorch is not installed; pip install 'modicum[peers]'")


def library_of(name: str) -> str:
    """Whose matrix products a contender uses."""
    return "XLA" if name.startswith("ours") else "PyTorch"


def per_step(reply: dict[str, float], steps: int) -> dict[str, float]:
    """A round's seconds divided by its steps."""
    return {key: value if key == "loss" else value / steps for key, value in reply.items()}


def keep_best(best: dict[tuple[int, int, int], dict[str, float]], worker: Worker, job: StepJob) -> None:
    """Time every product of the job and the square one, and keep what was never faster."""
    for sizes in {SQUARE, *(sizes for _, sizes in job.products())}:
        new, old = worker.product(sizes), best.get(sizes)
        best[sizes] = {clock: min(new[clock], old[clock]) if old else new[clock] for clock in new}
