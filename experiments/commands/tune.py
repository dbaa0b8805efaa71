"""`modicum tune MODEL --data DATA lora`: a trained model tuned to a task, by a delta or wholly."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import tyro

from ... import InputError
from .method_kinds import Prefixed, SiteOrLeaf, TuningMethod
from .methods import Method
from .options import PlacementOptions, TrainingOptions
from .reading import Reading

if TYPE_CHECKING:
    from ...models.config import TransformerConfig
    from ...models.heads import Head
    from ...research.data.sources import Source
    from ...research.training.config import TrainingConfig
    from ...research.training.tuning import TuningTask
    from .language_models import LanguageModel

POOLINGS = {"decoder": "last", "encoder": "mean"}
"""What is classified unless told, by the model's kind: a decoder's last token alone has read all."""


@dataclass(frozen=True)
class TuneRun:
    """What a tuning run is asked for: its identity is hashed from this."""

    model: TransformerConfig
    head: Head | None
    backbone: str
    method: TuningMethod
    training: TrainingConfig
    length: int
    truncate: bool
    reading: Reading


class Prepared(NamedTuple):
    """The model as it was opened, the encoded splits, the labels (none: text-to-text), the data's digest."""

    speaker: LanguageModel
    rows: dict[str, Any]
    labels: tuple[Any, ...] | None
    fingerprint: str


@dataclass(frozen=True)
class Tune:
    """Tune a trained model to a task: to tell labels apart or, with --target-column, to answer in text.

    MODEL is a published checkpoint (its folder or its name on the Hugging Face hub) or what `modicum train`
    left. Several learning rates are compared on the dev split by successive halving; what was trained at the
    best is measured on the test split and stored, a delta as a delta only.
    """

    model: tyro.conf.Positional[str]
    """A folder with config.json, safetensors and a tokenizer; a hub name; or a run of `modicum train`."""
    method: Method
    data: str = tyro.MISSING
    """A folder with train, dev and test files, a file, or a hub name."""
    out: Path = Path("runs/tune")
    """Folder of the runs, one for each learning rate and seed."""
    text_column: str = "text"
    pair_column: str = ""
    """The column of a second text, where pairs are classified; --text-column is the first's."""
    prompt: str = ""
    """The model's input made of several columns, such as '{question} {sentence} same?'."""
    label_column: str = "label"
    target_column: str = ""
    """The column of texts that the model is to answer with, in place of labels: text-to-text."""
    learning_rate: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Learning rates to try; a comparison of methods at one learning rate says little."""
    sweep: Literal["halving", "all"] = "halving"
    """Drop the worse half of the learning rates after a quarter and after half of the steps, where the dev
    split is evaluated; or train all to the end."""
    seeds: int = 1
    """Runs at the best learning rate, with seeds from --seed on: for a mean and its spread."""
    length: int = 0
    """Longest text in tokens; 0: the longest there is, which must fit the model's positions."""
    truncate: bool = False
    """Cut longer texts instead of refusing them."""
    pooling: Literal["auto", "last", "first", "mean"] = "auto"
    """What is classified: the last token's hidden state, the first's, or the mean. Auto: a decoder's last, an
    encoder's mean."""
    peft: Path | None = None
    """Write the best text-to-text delta on a published model to this folder too, as an adapter of PEFT."""
    ignore: tuple[str, ...] = ()
    """Keys of a published config.json to pass over although nobody here knows them."""
    training: TrainingOptions = field(default_factory=lambda: TrainingOptions(steps=300, evaluate_every=75))
    placement: PlacementOptions = field(default_factory=PlacementOptions)

    def run(self) -> int:
        """Tune at each learning rate, choose on dev, report on test."""
        from .tuning_runs import TuningRuns, Unfinished

        configs = self._configs()
        reading = self._reading()
        # What is wrong with it is said before anything is read.
        self.method.check(self.training.steps, averaged=self.training.ema > 0)
        self._check_peft(reading)
        layout = self.placement.layout(self.training.batch)
        prepared = self._prepare(reading)
        runs = TuningRuns(
            out=self.out,
            task_of=lambda seed: self._task(prepared, reading, seed),
            question_of=lambda task, config: self._question(task, config, prepared, reading),
            name=self.method.command,
            fingerprint=prepared.fingerprint,
            layout=layout,
            speaker=prepared.speaker,
        )
        if self.peft is not None:
            runs.require_peft(self.training.seed)
        try:
            best = runs.choose(configs, self.sweep)
            folder = runs.conclude(best, self.seeds)
        except Unfinished as stopped:
            return stopped.code
        if self.peft is not None:
            runs.save_peft(folder, self.peft)
        return 0

    def _configs(self) -> list[TrainingConfig]:
        if not self.learning_rate:
            raise InputError("learning_rate: no number given; give one or more, such as 3e-4 1e-3")
        if len(set(self.learning_rate)) < len(self.learning_rate):
            raise InputError(f"learning_rate: {' '.join(map(str, self.learning_rate))} has a number twice")
        if self.seeds < 1:
            raise InputError(f"seeds={self.seeds} must be at least 1")
        metric: Literal["loss", "accuracy"] = "loss" if self.target_column else "accuracy"
        return [self.training.config(rate, metric) for rate in self.learning_rate]

    def _check_peft(self, reading: Reading) -> None:
        """Refuse at once, before the model is read, what PEFT's files never hold."""
        from ...research.delta.peft.kinds import codec_for
        from .language_models import is_own

        if self.peft is None:
            return
        if reading.kind == "classification":
            raise InputError(
                "--peft writes text-to-text deltas: PEFT's classifiers end in heads of their own"
            )
        if is_own(self.model):
            raise InputError(f"--peft is for published models, and {self.model} is none")
        method = self.method.method() if isinstance(self.method, SiteOrLeaf) else None
        if method is None or codec_for(method) is None:
            raise InputError(f"--peft: PEFT has no {self.method.command}")
        if isinstance(self.method, Prefixed) and not self.method.shift_positions:
            raise InputError(
                "--peft: PEFT counts a prefix as past tokens: give --shift-positions to train so"
            )

    def _reading(self) -> Reading:
        return Reading(self.text_column, self.pair_column, self.prompt, self.label_column, self.target_column)

    def _prepare(self, reading: Reading) -> Prepared:
        from ...research.data.examples import Labels
        from .reading import alike, longest

        speaker = self._open(reading)
        limit = longest(speaker, self.length)
        splits = self._splits(reading)
        labels = None if reading.kind == "text-to-text" else Labels.of(splits["train"])
        encoded = {
            split: reading.rows(source, speaker, labels, limit, self.truncate)
            for split, source in splits.items()
        }
        names = None if labels is None else labels.names
        fingerprint = "-".join(source.fingerprint for source in splits.values())
        return Prepared(speaker, alike(encoded, self.length), names, fingerprint)

    def _open(self, reading: Reading) -> LanguageModel:
        from ...models.precision import policy
        from .language_models import open_body, open_language_model, require_plain_prompts

        if reading.kind == "classification":
            speaker = open_body(self.model, self.ignore)
            self._pooling(speaker)  # refused before anything is read
        else:
            speaker = open_language_model(self.model, "float32", self.ignore)
            if speaker.pretrained is not None:
                require_plain_prompts(self.model, speaker.pretrained)
        config = replace(speaker.model.config, precision=policy(self.training.precision))
        return replace(speaker, model=replace(speaker.model, config=config))

    def _pooling(self, speaker: LanguageModel) -> Any:
        kind = speaker.model.config.kind
        if self.pooling == "last" and kind == "encoder":
            raise InputError(
                f"pooling=last of {self.model}, an encoder: its last token is no more than a mark; "
                f"valid: mean, first"
            )
        return POOLINGS[kind] if self.pooling == "auto" else self.pooling

    def _splits(self, reading: Reading) -> dict[str, Source]:
        splits = reading.splits(self.data)
        for needed in ("train", "dev"):
            if needed not in splits:
                raise InputError(
                    f"{self.data}: no {needed} split; tuning needs train and dev, and reports on test"
                )
        return splits

    def _task(self, prepared: Prepared, reading: Reading, seed: int) -> TuningTask:
        """What is tuned; a classifier's head is drawn from the seed."""
        from ...models.heads import ClassifierHead, last_layer_apart
        from ...research.training.model_folder import TrainedModel, with_classifier
        from ...research.training.tuning import TuningTask

        speaker, classifies = prepared.speaker, prepared.labels is not None
        model, params = speaker.model, speaker.params
        notes: dict[str, Any] = {"kind": reading.kind, "reading": asdict(reading)}
        if prepared.labels is not None:
            pooling = self._pooling(speaker)
            narrow = pooling != "mean" and last_layer_apart(model.config)
            head = ClassifierHead(len(prepared.labels), pooling, narrow=narrow)
            model, params = with_classifier(TrainedModel(model, params), head, seed)
            notes |= {"labels": list(prepared.labels), "pooling": pooling}
        else:
            notes |= {"stops": list(speaker.stops), "start": speaker.start}
        spec = self.method.spec(params, classifies)
        return TuningTask(
            model,
            params,
            spec,
            prepared.rows,
            reading.kind,
            notes,
            speaker.kept,
            self.method.wrap,
            self.method.settle,
            self.method.best_from(self.training.steps),
        )

    def _question(
        self, task: TuningTask, config: TrainingConfig, prepared: Prepared, reading: Reading
    ) -> TuneRun:
        from ...research.training.fingerprint import combined

        length = next(iter(prepared.rows["train"][0].values())).shape[-1]
        return TuneRun(
            task.model.config,
            task.model.head,
            combined(task.params),
            self.method,
            config,
            length,
            self.truncate,
            reading,
        )
