"""The runs of `modicum tune`: learning rates by successive halving, then further seeds at the best one."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import jax

from ... import InputError
from ...parallel.layout import Layout
from ...parallel.processes import barrier, is_main, main_first
from ...research.study.halving import Found, successive_halving
from ...research.study.records import read_records
from ...research.study.runs import METRICS, Run
from ...research.training.config import TrainingConfig
from ...research.training.loop import Outcome
from ...research.training.stopping import NonFiniteLoss
from ...research.training.tuning import DELTA, Tuner, TuningTask, load_tuned
from .language_models import LanguageModel
from .progress import say, training_bar
from .reading import exactly_answered
from .stops import exit_code
from .train import describe_devices

logger = logging.getLogger(__name__)

Evaluations = Sequence[Mapping[str, float]]
Score = tuple[float, ...]
LOST: Score = (-math.inf,)


class Unfinished(Exception):
    """A run was stopped by a signal; `code` is the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True)
class TuningRuns:
    """Runs of one task in folders below `out`, which share their compiled programs.

    `task_of(seed)` is what is tuned, `question_of(task, config)` what a run is asked for.
    """

    out: Path
    task_of: Callable[[int], TuningTask]
    question_of: Callable[[TuningTask, TrainingConfig], Any]
    name: str
    fingerprint: str
    layout: Layout
    speaker: LanguageModel
    opened: dict[TrainingConfig, Run] = field(default_factory=dict)
    tasks: dict[int, TuningTask] = field(default_factory=dict)

    @cached_property
    def tuner(self) -> Tuner:
        """What trains them."""
        return Tuner(self.layout)

    def choose(self, configs: Sequence[TrainingConfig], sweep: Literal["halving", "all"]) -> TrainingConfig:
        """The configuration that is best on dev, its run finished as are those that came as far."""
        stops = rungs(configs[0]) if sweep == "halving" else [configs[0].steps]
        with ExitStack() as stack:
            for config in configs:  # a run in the way is found before hours of training
                stack.enter_context(self.open(config).unless_refused())
            if len(configs) > 1:
                say(budget(len(configs), stops, configs[0].batch))
            found = successive_halving(
                configs,
                stops=stops,
                advance=lambda config, score, start, stop: self.advance(
                    config, stop, alone=len(configs) == 1
                ),
                score=lambda score: score,
            )
        last = found.rungs[-1].scores
        if last[found.best] == LOST:
            raise InputError(
                f"{self.out}: the loss was finite at none of the learning rates; give lower ones"
            )
        for config in (each for each in last if last[each] != LOST):
            self.finish(config)
        if len(configs) > 1:
            say("\n".join(table(found)))
        return found.best

    def conclude(self, best: TrainingConfig, seeds: int) -> Path:
        """Train the further seeds and say what came out; returns the folder of the best run."""
        chosen = [replace(best, seed=best.seed + number) for number in range(seeds)]
        for config in chosen[1:]:
            with self.open(config).unless_refused():
                self.advance(config, config.steps, alone=True)
            self.finish(config)
        results = {config: self.opened[config].result for config in chosen}
        for config, result in results.items():
            folder, means = self.opened[config].folder, described(result, "dev", config)
            say(f"{folder}: {means} (best at step {result['best_step']})")
        if seeds > 1:
            say(f"over {seeds} seeds: {spread(list(results.values()), best)}")
        ranked = max(chosen, key=lambda config: score_of(results[config], config, "dev_"))
        result = results[ranked]
        test = f"{described(result, 'test', ranked)}, " if "test_loss" in result else ""
        say(
            f"best: {self.opened[ranked].folder}: {test}{result['trained_parameters']:,} trained parameters, "
            f"{result['stored_bytes']:,} bytes stored"
        )
        return self.opened[ranked].folder

    def require_peft(self, seed: int) -> None:
        """Raise `InputError` where PEFT cannot have the delta, found out on one that is not trained yet."""
        from ...research.delta.peft import save_peft

        assert self.speaker.pretrained is not None
        tuned, variables = self.task(seed).untrained()
        with TemporaryDirectory() as folder:
            save_peft(folder, tuned, variables, self.speaker.pretrained)

    def save_peft(self, folder: Path, target: Path) -> None:
        """Write the delta of a finished run as an adapter of PEFT."""
        from ...research.delta.peft import save_peft

        assert self.speaker.pretrained is not None
        if is_main():
            delta = load_tuned(folder / DELTA, self.speaker.model, self.speaker.params)
            save_peft(target, delta.tuned, delta.variables, self.speaker.pretrained)
        say(f"{target}: the same as an adapter of PEFT")

    def open(self, config: TrainingConfig) -> Run:
        """The run of one learning rate and seed."""
        if config in self.opened:
            return self.opened[config]
        task = self.task(config.seed)
        first = next(iter(self.opened), config)
        seed = f"-seed{config.seed}" if config.seed != first.seed else ""
        with main_first(f"opened {len(self.opened)}"):
            self.opened[config] = Run.open(
                self.out,
                self.question_of(task, config),
                seed=config.seed,
                data_fingerprint=self.fingerprint,
                name=f"{self.name}-{config.optimizer.learning_rate:g}{seed}",
                devices=describe_devices(self.layout),
                write=is_main(),
            )
        return self.opened[config]

    def task(self, seed: int) -> TuningTask:
        """What is tuned with this seed."""
        if seed not in self.tasks:
            self.tasks[seed] = self.task_of(seed)
        return self.tasks[seed]

    def advance(self, config: TrainingConfig, stop: int, alone: bool) -> Score:
        """Train a run up to `stop`; returns the score of its best evaluation so far, of those that count."""
        run = self.open(config)
        try:
            evaluations = self._recorded(run, stop) or self._train(run, config, stop).evaluations
        except NonFiniteLoss as failure:
            if alone:
                raise
            logger.warning("%s: %s", run.folder, failure)  # the other learning rates may do
            return LOST
        settled = [each for each in evaluations if each["step"] >= self.task(config.seed).best_from]
        return max(score_of(each, config) for each in settled or evaluations)

    def finish(self, config: TrainingConfig) -> None:
        """Store what a run trained, unless that was done before."""
        run = self.open(config)
        if run.state == "finished":
            say(f"{run.folder}: finished before, nothing to do")
            return
        outcome = self._train(run, config, config.steps)
        self.tuner.finish(run, self.task(config.seed), config, outcome, self._answers)
        barrier(f"tuned {run.folder.name}")  # the first process has written the result that all read

    def _train(self, run: Run, config: TrainingConfig, stop: int) -> Outcome:
        task = self.task(config.seed)
        with training_bar(run.folder.name, config.steps) as report:
            outcome = self.tuner.train(run, task, config, until=stop, report=report)
        if code := exit_code(outcome, run.folder):
            raise Unfinished(code)
        return outcome

    def _answers(self, task: TuningTask, plain: Callable[[], tuple[Any, Any]]) -> Mapping[str, float]:
        """The share of texts that are answered exactly, of the test split where there is one."""
        split = "test" if "test" in task.rows else "dev"
        found = exactly_answered(task.rows[split], self.speaker, plain)
        return {f"{split}_{name}": value for name, value in found.items()}

    def _recorded(self, run: Run, stop: int) -> Evaluations | None:
        """The evaluations up to `stop` of a run that has been there; processes that only read cannot tell."""
        if jax.process_count() > 1 or not (run.folder / METRICS).exists():
            return None
        records = read_records(run.folder / METRICS)
        found = [
            {name.removeprefix("evaluation_"): value for name, value in record.items()}
            for record in records
            if "evaluation_loss" in record and record["step"] <= stop
        ]
        return found if found and (run.state == "finished" or found[-1]["step"] == stop) else None


def rungs(config: TrainingConfig) -> list[int]:
    """Where the better half goes on: the first evaluations after a quarter and after half of the steps."""
    every = config.evaluate_every or config.steps
    marks = [*range(every, config.steps, every), config.steps]
    return sorted({next(mark for mark in marks if mark >= config.steps * part / 4) for part in (1, 2, 4)})


def budget(candidates: int, stops: Sequence[int], batch: int) -> str:
    """What the sweep trains, beside what training all of it would take."""
    left, start, updates, parts = candidates, 0, 0, []
    for stop in stops:
        parts.append(f"{left} to step {stop}")
        updates += left * (stop - start)
        left, start = max(1, math.ceil(left / 2)), stop
    whole = candidates * stops[-1]
    beside = f", all of them to the end {whole:,}" if updates < whole else ""
    return f"learning rates: {', '.join(parts)}: {updates:,} updates of {batch} rows{beside}"


def score_of(means: Mapping[str, Any], config: TrainingConfig, prefix: str = "") -> Score:
    """Larger is better: the accuracy that the run is judged by, then the loss; or the loss alone."""
    loss = -float(means[f"{prefix}loss"])
    if not math.isfinite(loss):
        return LOST
    return (float(means[f"{prefix}accuracy"]), loss) if config.best_name == "accuracy" else (loss,)


def described(result: Mapping[str, Any], split: str, config: TrainingConfig) -> str:
    """What a split's means say: accuracy, of text what it is of, and the share of texts that are exact."""
    accuracy = f"{split} accuracy {result[f'{split}_accuracy']:.1%}"
    if config.best_name == "accuracy":
        return accuracy
    exact = result.get(f"{split}_exact_match")
    means = f"{split} loss {result[f'{split}_loss']:.4f}, {accuracy} of tokens"
    return means if exact is None else f"{means}, {exact:.1%} of texts exact"


def spread(results: Sequence[Mapping[str, Any]], config: TrainingConfig) -> str:
    """Means and standard deviations over seeds."""
    split = "test" if "test_loss" in results[0] else "dev"
    values = [100 * result[f"{split}_accuracy"] for result in results]
    of = "" if config.best_name == "accuracy" else " of tokens"
    return f"{split} accuracy {statistics.mean(values):.1f}% ± {statistics.stdev(values):.1f}{of}"


def table(found: Found[TrainingConfig]) -> list[str]:
    """A line for each learning rate: what it scored on dev at each stop."""
    stops = [f"step {rung.stop}" for rung in found.rungs]
    lines = [["learning rate", *stops]]
    for config in found.rungs[0].scores:
        cells = [_cell(rung.scores.get(config)) for rung in found.rungs]
        lines.append([f"{config.optimizer.learning_rate:g}", *cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines]


def _cell(score: Any) -> str:
    if score is None:
        return "–"
    if score == LOST:
        return "not finite"
    return f"{score[0]:.1%}" if len(score) > 1 else f"loss {-score[0]:.4f}"
