"""The process of one contender: commands come in as lines of JSON, timings go out as lines of JSON.

    python -m modicum.experiments.bench.worker NAME JOB THREADS

A process each, so that thread pools, allocators and caches of two frameworks never meet. `THREADS` 0 leaves
the process on all the processors it is given.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np

from ...research.training.host_memory import keep_freed_memory
from .attention_job import AttentionJob
from .generation_job import GenerationJob
from .job import DecoderJob
from .tuning_job import TuningJob

REPEATS = 2  # of a matrix product; the faster counts
STATUS = Path("/proc/self/status")
READS = 16  # of a large matrix; all count, as all tokens do


class Trainer(Protocol):
    """Somebody who trains the job."""

    versions: str

    def run(self, steps: int) -> float:
        """Train for `steps` and return the last loss, once it is there."""

    def product(self, m: int, k: int, n: int) -> Callable[[], None]:
        """A function that multiplies `[m, k]` by `[k, n]` in float32 and waits for it."""


class Generator(Protocol):
    """Somebody who generates the job's text."""

    versions: str

    def generate(self, batch: int, new: int) -> np.ndarray:
        """`new` tokens for each of the job's prompts, `[batch, new]`."""

    def matrix_vector(self) -> Callable[[], None]:
        """A function that multiplies the job's large matrix by a vector and waits for it."""


class Attender(Protocol):
    """Somebody, or several, who attend to the job's arrays."""

    versions: str

    def contenders(self, length: int) -> dict[str, str]:
        """Who takes part, and why others of the same library do not (empty for those who do)."""

    def prepare(self, name: str, length: int, backward: bool) -> dict[str, Any]:
        """Compile what `attend` will run; `temporary` bytes of memory, where they are known."""

    def attend(self, name: str, backward: bool, calls: int = 1) -> Any:
        """So many calls, waited for; the last one's result."""

    def sample(self, result: Any) -> list[float]:
        """Some numbers of the output."""

    def forget(self) -> None:
        """Let go of what was prepared."""


Contender = Trainer | Generator | Attender


@dataclass(frozen=True)
class Timing:
    """Wall seconds, and seconds of all processors that this process was given."""

    wall: float
    cpu: float


def timed(function: Callable[[], Any]) -> tuple[Any, Timing]:
    """What `function` returns and how long it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    value = function()
    return value, Timing(time.perf_counter() - wall, time.process_time() - cpu)


def make_contender(name: str, job: str) -> Contender:
    """The contender of that name, with its job as JSON; imports its framework and no other."""
    match name:
        case "ours":
            from .ours import Ours

            return Ours(DecoderJob.from_json(job))
        case "eager" | "compiled":
            from .torch_training import TorchTraining

            return TorchTraining(DecoderJob.from_json(job), compiled=name == "compiled")
        case "ours-tuning" | "ours-tuning-wide":
            from .tuning_ours import OurTuning

            return OurTuning(TuningJob.from_json(job), narrow=name == "ours-tuning")
        case "peft" | "peft-compiled":
            from .tuning_torch import TorchTuning

            return TorchTuning(TuningJob.from_json(job), compiled=name == "peft-compiled")
        case "ours-generation":
            from .generation_ours import OurGeneration

            return OurGeneration(GenerationJob.from_json(job))
        case "transformers-generation":
            from .generation_torch import TransformersGeneration

            return TransformersGeneration(GenerationJob.from_json(job))
        case "attention-jax":
            from .attention_jax import JaxAttention

            return JaxAttention(AttentionJob.from_json(job))
        case "attention-torch" | "attention-torch-cpu":
            from .attention_torch import TorchAttention

            return TorchAttention(AttentionJob.from_json(job), on_cpu=name.endswith("cpu"))
    raise ValueError(f"no contender is called {name!r}")


def serve(contender: Contender, commands: Iterable[str], replies: TextIO) -> None:
    """Answer commands until there are no more."""
    for line in commands:
        command = json.loads(line)
        answer = measure(contender, **command)
        print(json.dumps(answer), file=replies, flush=True)


def measure(contender: Any, what: str, **arguments: Any) -> dict[str, Any]:
    """The reply to one command.

    `round` trains, `generate` generates, `product` and `read` multiply, `memory` tells the greatest resident
    memory since it was asked last; `attend` is one attention, of what `prepare` prepared, until `forget`.
    """
    match what:
        case "round":
            loss, timing = timed(lambda: contender.run(arguments["steps"]))
            return {"loss": loss, "wall": timing.wall, "cpu": timing.cpu}
        case "generate":
            tokens, timing = timed(lambda: contender.generate(**arguments))
            return {"tokens": tokens.tolist(), "wall": timing.wall, "cpu": timing.cpu}
        case "product":
            return best(contender.product(*arguments["sizes"]))
        case "read":
            return mean(contender.matrix_vector())
        case "memory":
            return {"peak": peak_memory()}
        case "contenders":
            return contender.contenders(**arguments)
        case "prepare":
            return unless_exhausted(lambda: contender.prepare(**arguments))
        case "attend":
            return attended(contender, **arguments)
        case "forget":
            return {"forgotten": contender.forget() is None}
    raise ValueError(f"no command is called {what!r}")


def attended(contender: Attender, calls: int, **arguments: Any) -> dict[str, Any]:
    """What a call took on average, or that memory was not enough; other errors end the process."""

    def called() -> dict[str, Any]:
        result, timing = timed(lambda: contender.attend(calls=calls, **arguments))
        return {"sample": contender.sample(result), "wall": timing.wall / calls, "cpu": timing.cpu / calls}

    return unless_exhausted(called)


def unless_exhausted(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `function` returns, or that memory was not enough for it, to run or already to compile."""
    try:
        return function()
    except RuntimeError as error:  # both libraries' errors are of this kind
        if not any(words in str(error).lower() for words in ("resource_exhausted", "out of memory")):
            raise
        return {"left_out": "it is out of memory"}


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process in memory, now or (`VmHWM`) at most; 0 where the system does not tell."""
    if not STATUS.exists():
        return 0
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def peak_memory() -> int:
    """The greatest number of bytes in memory so far; counting starts again."""
    peak = resident("VmHWM")
    if peak:
        Path("/proc/self/clear_refs").write_text("5")
    return peak


def best(function: Callable[[], Any]) -> dict[str, float]:
    """The shortest times of a few calls, after one that compiles and allocates."""
    function()
    timings = [timed(function)[1] for _ in range(REPEATS)]
    return {"wall": min(timing.wall for timing in timings), "cpu": min(timing.cpu for timing in timings)}


def mean(function: Callable[[], Any]) -> dict[str, float]:
    """The mean times of many calls, after one that compiles and allocates."""
    function()
    timing = timed(lambda: [function() for _ in range(READS)])[1]
    return {"wall": timing.wall / READS, "cpu": timing.cpu / READS}


def main(name: str, job: str, threads: str) -> None:
    """Serve on standard input and output."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a framework prints must not reach the pipe
    if int(threads):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(threads)])
    keep_freed_memory()  # as `modicum train` and `modicum tune` do; for every contender alike
    contender = make_contender(name, job)
    started = {"versions": contender.versions, "loaded": resident()}
    print(json.dumps(started), file=replies, flush=True)
    serve(contender, sys.stdin, replies)


if __name__ == "__main__":
    main(*sys.argv[1:])
