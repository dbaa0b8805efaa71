"""`modicum tune MODEL --data DATA lora`: a classifier from a trained model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ... import InputError
from .methods import Adapter, Bitfit, FullTuning, Lora, Probe, TuningMethod
from .options import PlacementOptions, TrainingOptions
from .train import describe_devices

if TYPE_CHECKING:
    from ...models.config import TransformerConfig
    from ...models.model import Params
    from ...models.transformer import Transformer
    from ...parallel.layout import Layout
    from ...research.data.examples import Examples, Labels
    from ...research.data.sources import Source
    from ...research.data.tokenizers import Tokenizer
    from ...research.study.runs import Run
    from ...research.training.config import TrainingConfig
    from ...research.training.tuning import ClassificationRows

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
    backbone: str
    method: TuningMethod
    training: TrainingConfig
    length: int
    truncate: bool


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
        from ...models.heads import ClassifierHead
        from ...research.data.examples import Labels
        from ...research.training.model_folder import find_model, load_model, load_tokenizer, with_classifier
        from ...research.training.tuning import ClassificationRows

        layout = self.placement.layout()
        trained = load_model(find_model(self.model))
        tokenizer = load_tokenizer(trained, self.model)
        splits = self._splits()
        labels = Labels.of(splits["train"])
        examples = self._examples(trained.model.config, tokenizer, splits, labels)
        rows = ClassificationRows(
            examples["train"],
            examples["dev"],
            examples.get("test"),
            labels.names,
        )
        head = ClassifierHead(len(labels), self.pooling)
        model, params = with_classifier(trained, head, self.training.seed)
        model = replace(model, config=self._precise(model.config))
        runs = []
        for rate in self.learning_rate:
            run, code = self._attempt(rate, model, params, rows, splits, layout, tokenizer)
            if code:
                return code
            runs.append(run)
        return self._conclude(runs)

    def _splits(self) -> dict[str, Source]:
        from ...research.data.sources import load_splits

        splits = load_splits(self.data, self.text_column, self.label_column)
        for needed in ("train", "dev"):
            if needed not in splits:
                raise InputError(
                    f"{self.data}: no {needed} split; tuning needs train and dev, and reports on test"
                )
        return splits

    def _examples(
        self, config: TransformerConfig, tokenizer: Tokenizer, splits: dict[str, Source], labels: Labels
    ) -> dict[str, Examples]:
        from ...research.data.examples import examples

        length = self.length or getattr(config.positions, "max_length", 128)
        return {
            split: examples(source, tokenizer, labels, length, truncate=self.truncate)
            for split, source in splits.items()
        }

    def _precise(self, config: TransformerConfig) -> TransformerConfig:
        from ...models.precision import policy

        return replace(config, precision=policy(self.training.precision))

    def _attempt(
        self,
        rate: float,
        model: Transformer,
        params: Params,
        rows: ClassificationRows,
        splits: dict[str, Source],
        layout: Layout,
        tokenizer: Tokenizer,
    ) -> tuple[Run, int]:
        """One learning rate, and the exit code where it was stopped by a signal."""
        from ...parallel.processes import is_main
        from ...research.study.runs import Run
        from ...research.training.fingerprint import combined
        from ...research.training.tuning import tune_classifier
        from .progress import training_bar
        from .stops import exit_code

        config = self.training.config(rate, "accuracy")
        question = TuneRun(
            model.config, combined(params), self.method, config, len(rows.train[0]["tokens"]), self.truncate
        )
        run = Run.open(
            self.out,
            question,
            seed=self.training.seed,
            data_fingerprint="-".join(source.fingerprint for source in splits.values()),
            name=f"{method_name(self.method)}-{rate:g}",
            devices=describe_devices(layout),
            write=is_main(),
        )
        with training_bar(run.folder.name, config.steps) as report:
            outcome = tune_classifier(
                run,
                model,
                params,
                self.method.spec(),
                rows,
                config,
                layout=layout,
                report=report,
                tokenizer=tokenizer,
            )
        return run, exit_code(outcome, run.folder) if outcome else 0

    def _conclude(self, runs: list[Run]) -> int:
        """Print a line a learning rate, and the best by dev."""
        results = {run.folder: run.result for run in runs}
        for folder, result in results.items():
            print(f"{folder}: dev accuracy {result['dev_accuracy']:.1%} (best at step {result['best_step']})")
        best = max(results, key=lambda folder: results[folder]["dev_accuracy"])
        result = results[best]
        test = f"test accuracy {result['test_accuracy']:.1%}, " if "test_accuracy" in result else ""
        print(
            f"best: {best}: {test}{result['trained_parameters']:,} trained parameters, "
            f"{result['stored_bytes']:,} bytes stored"
        )
        return 0


def method_name(method: TuningMethod) -> str:
    """What the method is called on the command line."""
    return {Lora: "lora", Adapter: "adapter", Bitfit: "bitfit", Probe: "probe", FullTuning: "full"}[
        type(method)
    ]
