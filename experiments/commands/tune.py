"""`modicum tune MODEL --data DATA lora`: a classifier from a trained model."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import tyro

from ... import InputError
from .methods import Adapter, Bitfit, FullTuning, Lora, Probe, TuningMethod
from .options import UNLIMITED_LENGTH, PlacementOptions, TrainingOptions
from .train import describe_devices

if TYPE_CHECKING:
    from ...models.config import TransformerConfig
    from ...models.heads import ClassifierHead
    from ...models.model import Params
    from ...models.transformer import Transformer
    from ...parallel.layout import Layout
    from ...research.data.sources import Source
    from ...research.data.tokenizers import Tokenizer
    from ...research.study.runs import Run
    from ...research.training.config import TrainingConfig
    from ...research.training.model_folder import TrainedModel
    from ...research.training.tuning import ClassificationRows

logger = logging.getLogger(__name__)

Method = (
    Annotated[Lora, tyro.conf.subcommand("lora")]
    | Annotated[Adapter, tyro.conf.subcommand("adapter")]
    | Annotated[Bitfit, tyro.conf.subcommand("bitfit")]
    | Annotated[Probe, tyro.conf.subcommand("probe")]
    | Annotated[FullTuning, tyro.conf.subcommand("full")]
)


@dataclass(frozen=True)
class TuneRun:
    """What a tuning run is asked for: its identity is hashed from this."""

    model: TransformerConfig
    head: ClassifierHead
    backbone: str
    method: TuningMethod
    training: TrainingConfig
    length: int
    truncate: bool


class Task(NamedTuple):
    """The model with a fresh head, its parameters and tokenizer, and the encoded data with its digest."""

    model: Transformer
    params: Params
    tokenizer: Tokenizer
    rows: ClassificationRows
    fingerprint: str


@dataclass(frozen=True)
class Tune:
    """Tune a trained model to a classification task.

    One run for each learning rate; the best on the dev split is evaluated on the test split and stored, a
    delta as a delta only.
    """

    model: tyro.conf.Positional[Path]
    """A model folder, or a finished run of `modicum train`."""
    method: Method
    data: str = tyro.MISSING
    """A folder with train, dev and test files, a file, or a hub name."""
    out: Path = Path("runs/tune")
    """Folder of the runs, one for each learning rate."""
    text_column: str = "text"
    label_column: str = "label"
    learning_rate: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Learning rates to try; a comparison of methods at one learning rate says little."""
    length: int = 0
    """Longest text in tokens; 0: as many as the model has positions, 128 where it has no limit."""
    truncate: bool = False
    """Cut longer texts instead of refusing them."""
    pooling: Literal["last", "first", "mean"] = "last"
    """What is classified: the last token's hidden state, the first's, or the mean."""
    training: TrainingOptions = field(default_factory=lambda: TrainingOptions(steps=300))
    placement: PlacementOptions = field(default_factory=PlacementOptions)

    def run(self) -> int:
        """Tune at each learning rate, choose on dev, report on test."""
        from ...research.training.stopping import NonFiniteLoss

        if not self.learning_rate:
            raise InputError("learning_rate: no number given; give one or more, such as 3e-4 1e-3")
        configs = [self.training.config(rate, "accuracy") for rate in self.learning_rate]
        self.method.spec()  # what is wrong with it is said before anything is read
        layout = self.placement.layout(self.training.batch)
        task = self._task()
        runs = []
        for config in configs:
            run = self._open(config, task, layout)
            try:
                with run.unless_refused():
                    code = self._attempt(run, config, task, layout)
            except NonFiniteLoss as failure:
                if len(configs) == 1:
                    raise
                logger.warning("%s: %s", run.folder, failure)  # the other learning rates may do
                continue
            if code:
                return code
            runs.append(run)
        if not runs:
            raise InputError(
                f"{self.out}: the loss was finite at none of the learning rates; give lower ones"
            )
        self._conclude(runs)
        return 0

    def _task(self) -> Task:
        from ...models.heads import ClassifierHead
        from ...models.precision import policy
        from ...research.data.examples import Labels, examples
        from ...research.training.model_folder import find_model, load_model, load_tokenizer, with_classifier
        from ...research.training.tuning import ClassificationRows

        trained = load_model(find_model(self.model))
        tokenizer = load_tokenizer(trained, self.model)
        length = self._length(trained)
        splits = self._splits()
        labels = Labels.of(splits["train"])
        encoded = {
            split: examples(source, tokenizer, labels, length, truncate=self.truncate)
            for split, source in splits.items()
        }
        rows = ClassificationRows(encoded["train"], encoded["dev"], encoded.get("test"), labels.names)
        model, params = with_classifier(
            trained, ClassifierHead(len(labels), self.pooling), self.training.seed
        )
        model = replace(model, config=replace(model.config, precision=policy(self.training.precision)))
        fingerprint = "-".join(source.fingerprint for source in splits.values())
        return Task(model, params, tokenizer, rows, fingerprint)

    def _length(self, trained: TrainedModel) -> int:
        positions = trained.model.config.positions
        positions.require(self.length)
        return self.length or positions.limit or UNLIMITED_LENGTH

    def _splits(self) -> dict[str, Source]:
        from ...research.data.sources import load_splits

        splits = load_splits(self.data, self.text_column, self.label_column)
        for needed in ("train", "dev"):
            if needed not in splits:
                raise InputError(
                    f"{self.data}: no {needed} split; tuning needs train and dev, and reports on test"
                )
        return splits

    def _open(self, config: TrainingConfig, task: Task, layout: Layout) -> Run:
        """The run of one learning rate."""
        from ...models.heads import ClassifierHead
        from ...parallel.processes import is_main, main_first
        from ...research.study.runs import Run
        from ...research.training.fingerprint import combined

        assert isinstance(task.model.head, ClassifierHead)
        question = TuneRun(
            task.model.config,
            task.model.head,
            combined(task.params),
            self.method,
            config,
            task.rows.train.length,
            self.truncate,
        )
        with main_first("opened"):
            return Run.open(
                self.out,
                question,
                seed=self.training.seed,
                data_fingerprint=task.fingerprint,
                name=f"{method_name(self.method)}-{config.optimizer.learning_rate:g}",
                devices=describe_devices(layout),
                write=is_main(),
            )

    def _attempt(self, run: Run, config: TrainingConfig, task: Task, layout: Layout) -> int:
        """One learning rate; returns the exit code, not 0 where it was stopped by a signal."""
        from ...parallel.processes import barrier
        from ...research.training.tuning import tune_classifier
        from .progress import say, training_bar
        from .stops import exit_code

        with training_bar(run.folder.name, config.steps) as report:
            outcome = tune_classifier(
                run,
                task.model,
                task.params,
                self.method.spec(),
                task.rows,
                config,
                layout=layout,
                report=report,
                tokenizer=task.tokenizer,
            )
        if outcome is None:
            say(f"{run.folder}: finished before, nothing to do")
            return 0
        barrier("tuned")  # the first process has written the result that all read
        return exit_code(outcome, run.folder)

    def _conclude(self, runs: list[Run]) -> None:
        """Print a line a learning rate, and the best by dev."""
        from .progress import say

        results = {run.folder: run.result for run in runs}
        for folder, result in results.items():
            say(f"{folder}: dev accuracy {result['dev_accuracy']:.1%} (best at step {result['best_step']})")
        best = max(results, key=lambda folder: results[folder]["dev_accuracy"])
        result = results[best]
        test = f"test accuracy {result['test_accuracy']:.1%}, " if "test_accuracy" in result else ""
        say(
            f"best: {best}: {test}{result['trained_parameters']:,} trained parameters, "
            f"{result['stored_bytes']:,} bytes stored"
        )


def method_name(method: TuningMethod) -> str:
    """What the method is called on the command line."""
    return {Lora: "lora", Adapter: "adapter", Bitfit: "bitfit", Probe: "probe", FullTuning: "full"}[
        type(method)
    ]
