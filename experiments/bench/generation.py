"""Measure generation of all contenders, round by round, and how fast the machine reads its memory.

Prefill is the time to the first token of each row; decoding is what more tokens take. At batch 1 a decoder
reads each of its weights once a token and does little else, so that their bytes over the memory's rate
bound the time of a token from below.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

from ... import InputError
from .generation_job import MATRIX, GenerationJob
from .processes import Worker
from .training import check

ContenderName = Literal["ours", "transformers"]
LABELS = {"ours": "Modicum", "transformers": "transformers"}
Report = Callable[[str], None]
Key = tuple[str, int]
NOT_READ = ("position_embedding/table", "type_embedding/table")


@dataclass(frozen=True)
class Seen:
    """What one run of the benchmark saw.

    `weights` are the bytes that a decoded token has to read. `rounds[name, batch]` has for each round the
    seconds `first` (to the first token) and `token` (of one more token in each row). `reads[name]` are bytes
    a second of a matrix-vector product in each round. `equal[batch]` is the share of equal tokens.
    """

    job: GenerationJob
    weights: int
    rounds: dict[Key, list[dict[str, float]]] = field(default_factory=dict)
    reads: dict[str, list[float]] = field(default_factory=dict)
    equal: dict[int, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    load: list[float] = field(default_factory=list)

    def seconds(self, key: Key, what: str) -> float:
        """Median over the rounds."""
        return median(one[what] for one in self.rounds[key])

    def advantage(self, key: Key, what: str) -> float:
        """How many times as long as ours it takes: the median over the rounds."""
        ours = self.rounds["ours", key[1]]
        return median(theirs[what] / own[what] for own, theirs in zip(ours, self.rounds[key]))

    def bandwidth(self) -> float:
        """Bytes a second: the better library's median."""
        return max(median(rates) for rates in self.reads.values())

    def of_bound(self, key: Key) -> float:
        """Which part of the memory's rate reading the weights once a step reaches."""
        return self.weights / self.seconds(key, "token") / self.bandwidth()


def measure_generation(
    model: str,
    *,
    batches: Sequence[int],
    prompt: int,
    new: int,
    rounds: int,
    contenders: Sequence[ContenderName],
    threads: int = 0,
    report: Report = print,
) -> Seen:
    """Warm every contender up, then let them take turns.

    `model` is a checkpoint's folder, or a preset, of which one with random weights is made.
    Raises `InputError` where transformers is needed and absent, and for counts below 1.
    """
    check(rounds=rounds, contenders=len(contenders), batches=len(batches), batch=min(batches, default=1))
    if "transformers" in contenders and importlib.util.find_spec("transformers") is None:
        raise InputError("transformers is not installed; pip install 'modicum[peers]'")
    with ExitStack() as stack:
        folder, vocab, weights = stack.enter_context(checkpoint(model, prompt + new + 1))
        job = GenerationJob(str(folder), vocab, prompt, new)
        seen = Seen(job, weights, load=[os.getloadavg()[0]])
        workers: dict[str, Worker] = {}
        for name in dict.fromkeys(contenders):
            report(f"{LABELS[name]}: loading and compiling")
            workers[name] = stack.enter_context(Worker(f"{name}-generation", job, threads))
            seen.versions[LABELS[name]] = workers[name].versions
        _compare(seen, workers, batches)
        for index in range(rounds):
            report(f"round {index + 1} of {rounds}")
            for name, worker in workers.items():
                seen.reads.setdefault(name, []).append(_rate(worker))
                for batch in batches:
                    seen.rounds.setdefault((name, batch), []).append(_round(worker, batch, new))
        seen.load.append(os.getloadavg()[0])
        return seen


def _compare(seen: Seen, workers: dict[str, Worker], batches: Sequence[int]) -> None:
    """Generate once with each, which also compiles, and compare the tokens."""
    for batch in batches:
        made = [worker.ask(what="generate", batch=batch, new=seen.job.new + 1) for worker in workers.values()]
        for worker in workers.values():
            worker.ask(what="generate", batch=batch, new=1)
        first = made[0]["tokens"]
        pairs = [(a, b) for other in made[1:] for x, y in zip(first, other["tokens"]) for a, b in zip(x, y)]
        if pairs:
            seen.equal[batch] = sum(a == b for a, b in pairs) / len(pairs)


def _round(worker: Worker, batch: int, new: int) -> dict[str, float]:
    first = worker.ask(what="generate", batch=batch, new=1)["wall"]
    more = worker.ask(what="generate", batch=batch, new=new + 1)["wall"]
    return {"first": first, "token": (more - first) / new}


def _rate(worker: Worker) -> float:
    return 4 * MATRIX[0] * MATRIX[1] / worker.ask(what="read")["wall"]


@contextmanager
def checkpoint(model: str, length: int) -> Iterator[tuple[Path, int, int]]:
    """A checkpoint's folder, its vocabulary and the bytes that each decoded token reads, in float32.

    Raises `InputError` for a model that is no decoder or has fewer than `length` positions.
    """
    from ...models.presets import PRESETS
    from ...models.pretrained import load_pretrained

    with tempfile.TemporaryDirectory(prefix="modicum-bench-") as temporary:
        folder = Path(model)
        if model in PRESETS:
            folder = random_gpt2(model, Path(temporary) / model)
        found = load_pretrained(folder)
        if found.model.config.kind != "decoder":
            raise InputError(f"{model} is an {found.model.config.kind}; this measures decoders")
        found.model.config.positions.require(length)
        config, weights = found.model.config, weight_bytes(found.params, found.model.config.tied)
        del found
        yield folder, config.vocab, weights


def random_gpt2(preset_name: str, folder: Path) -> Path:
    """A GPT-2 with random weights in the shape of one of our presets, saved for all contenders to load."""
    import jax
    import jax.numpy as jnp

    from ...models.presets import preset
    from ...models.pretrained import save_pretrained
    from ...models.transformer import Transformer

    model = Transformer(preset(preset_name))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return save_pretrained(folder, model, params, architecture="GPT2LMHeadModel")


def weight_bytes(params: Any, tied: bool) -> int:
    """Bytes of the parameters that decoding a token reads whole: of an untied word table it reads a row."""
    from flax.traverse_util import flatten_dict

    skipped = NOT_READ if tied else (*NOT_READ, "embedding/table")
    return sum(leaf.nbytes for path, leaf in flatten_dict(params, sep="/").items() if path not in skipped)
