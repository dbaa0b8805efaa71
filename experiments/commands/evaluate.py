"""`modicum evaluate MODEL --data DATA`: what a stored model or delta scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import tyro

from ... import InputError
from .language_models import is_published
from .options import UNLIMITED_LENGTH

WINDOWS, TOKENS = 8, 8192  # that are read at once: as many windows as have no more tokens

if TYPE_CHECKING:
    from ...research.data.sources import Source
    from ...research.data.tokenizers import Tokenizer
    from ...research.training.model_folder import TrainedModel
    from ...research.training.objectives import Forward
    from .language_models import LanguageModel


class Measured(NamedTuple):
    """A tuned model as its loss takes it; `plain` gives the model and parameters with which to generate."""

    forward: Forward
    trainable: Any
    frozen: Any
    plain: Callable[[], tuple[Any, Any]]


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a model, or a delta on its model.

    A language model gets loss, perplexity and next-token accuracy; a classifier, or a model with a delta of
    `modicum tune`, gets what that measured: loss and accuracy, and of text-to-text the share of texts that
    are answered exactly. A published language model, or one with --stride, gets the
    perplexity of all texts as one, joined by empty lines, under a window that slides over it.
    """

    model: tyro.conf.Positional[str]
    """A model folder, a finished run, or a published checkpoint's folder; under a delta, its backbone, which
    may be a name of the Hugging Face hub."""
    data: str
    """A file, a folder with splits, or a hub name."""
    delta: Path | None = None
    """A delta folder, or a finished run of `modicum tune`."""
    split: Literal["train", "dev", "test"] = "test"
    text_column: str = ""
    """The column of texts; empty: as it was tuned, or text."""
    pair_column: str = ""
    prompt: str = ""
    label_column: str = ""
    target_column: str = ""
    """As in `modicum tune`; empty: as it was tuned."""
    length: int = 0
    """Tokens of a row; 0: as many as the model has positions. Where these have no limit it is 128, and of a
    published model to be given. Of a tuned model the longest text; 0: the longest there is."""
    truncate: bool = False
    """Cut longer texts instead of refusing them."""
    stride: int = 0
    """Tokens by which the window of --length tokens slides; 0: half of it for a published model."""
    ignore: tuple[str, ...] = ()
    """Keys of a published config.json to pass over although nobody here knows them."""

    def run(self) -> int:
        """Print the means over the split."""
        from ...research.training.evaluation import perplexity
        from ...research.training.model_folder import find_model, load_model, load_tokenizer
        from .compilation import cache_compilations

        cache_compilations()
        if self.delta is not None:
            means = self._tuned(self.delta)
        elif self.stride or is_published(self.model):
            self._sliding()
            return 0
        else:
            trained = load_model(find_model(Path(self.model)))
            if trained.labels or trained.notes.get("kind"):
                means = self._whole(trained)
            else:
                means = self._language_model(trained, load_tokenizer(trained, Path(self.model)))
                means["perplexity"] = perplexity(means["loss"])
        print("  ".join(f"{name} {value:.4f}" for name, value in means.items()))
        return 0

    def _sliding(self) -> None:
        from ...research.evaluation import strided_perplexity
        from .language_models import open_language_model

        speaker = open_language_model(self.model, "float32", self.ignore)
        if speaker.pretrained is not None and speaker.pretrained.prepares:
            name = speaker.pretrained.architecture
            raise InputError(
                f"{self.model} holds a {name}, which reads a text behind a prompt; it is not evaluated"
            )
        window = self._window(speaker)
        text = "\n\n".join(self._source().texts())
        found = strided_perplexity(
            speaker.model,
            speaker.params,
            speaker.tokenizer.encode(text),
            window=window,
            stride=self.stride,
            rows=max(1, min(WINDOWS, TOKENS // window)),
        )
        means = {
            "loss": found.nats / found.scored,
            "perplexity": found.perplexity,
            "bits_per_byte": found.bits_per_byte(len(text.encode())),
        }
        print("  ".join(f"{name} {value:.4f}" for name, value in means.items()))

    def _window(self, speaker: LanguageModel) -> int:
        """Tokens of the window. A short one costs perplexity, so none is made up for a published model."""
        positions = speaker.model.config.positions
        positions.require(self.length)
        if speaker.pretrained is not None and not (self.length or positions.limit):
            trained = speaker.pretrained.settings.get("max_position_embeddings")
            known = f"; config.json has max_position_embeddings={trained}" if trained else ""
            raise InputError(
                f"{self.model} has no limit of positions: give --length, a window in tokens{known}"
            )
        return self.length or positions.limit or UNLIMITED_LENGTH

    def _language_model(self, trained: TrainedModel, tokenizer: Tokenizer) -> dict[str, Any]:
        from ...parallel.layout import Layout
        from ...research.data.packing import pack
        from ...research.training.evaluation import make_evaluation
        from ...research.training.objectives import full_tuning, language_modelling
        from ...research.training.tasks import evaluation_of

        source = self._source()
        rows = pack(
            tokenizer.encode(list(source.texts())), self._length(trained), tokenizer.eos, pad=tokenizer.pad
        )
        loss = language_modelling(full_tuning(trained.model))
        means = evaluation_of(make_evaluation(loss), rows, Layout.single())
        assert means is not None
        return means(trained.params, {})

    def _whole(self, trained: TrainedModel) -> dict[str, Any]:
        """What `modicum tune … full` left, measured as it was tuned."""
        from ...research.training.objectives import full_tuning
        from .language_models import open_own

        speaker = open_own(self.model)
        plain = trained.model, trained.params
        tuned = Measured(full_tuning(trained.model), trained.params, {}, lambda: plain)
        return self._means(speaker, {"labels": trained.labels, **trained.notes}, tuned)

    def _tuned(self, folder: Path) -> dict[str, Any]:
        """A delta on its backbone, measured as it was tuned."""
        from ...research.delta import read_header
        from ...research.training.objectives import delta_tuning
        from ...research.training.tuning import load_tuned
        from .language_models import find_delta, open_backbone

        folder = find_delta(folder)
        notes = read_header(folder).get("notes", {})
        speaker = open_backbone(self.model, notes, self.ignore)
        delta = load_tuned(folder, speaker.model, speaker.params)
        forward, trainable = delta_tuning(delta.tuned), delta.variables["delta"]
        tuned = Measured(forward, trainable, delta.frozen, delta.plain)
        return self._means(speaker, notes, tuned)

    def _means(self, speaker: LanguageModel, notes: Mapping[str, Any], tuned: Measured) -> dict[str, Any]:
        from ...parallel.layout import Layout
        from ...research.data.examples import Labels
        from ...research.training.evaluation import make_evaluation
        from ...research.training.tasks import evaluation_of
        from ...research.training.tuning import LOSSES
        from .reading import Reading, alike, exactly_answered, longest

        names = ("text_column", "pair_column", "prompt", "label_column", "target_column")
        reading = Reading.of(notes, **{name: getattr(self, name) for name in names})
        if reading.kind != notes.get("kind", "classification"):
            raise InputError(
                f"--target-column {self.target_column}: the model was tuned to tell labels apart"
            )
        labels = None if reading.kind == "text-to-text" else Labels(tuple(notes["labels"]))
        source = self._of_split(reading.splits(self.data))
        found = reading.rows(source, speaker, labels, longest(speaker, self.length), self.truncate)
        rows = alike({self.split: found}, self.length)[self.split]
        loss = LOSSES[reading.kind][0](tuned.forward)
        means = evaluation_of(make_evaluation(loss), rows, Layout.single())
        assert means is not None
        measured = means(tuned.trainable, tuned.frozen)
        return measured | exactly_answered(rows, speaker, tuned.plain)

    def _source(self) -> Source:
        from ...research.data.sources import load_splits

        return self._of_split(load_splits(self.data, self.text_column or "text"))

    def _of_split(self, splits: Mapping[str, Source]) -> Source:
        if list(splits) == ["train"] and Path(self.data).is_file():
            return splits["train"]  # one file is evaluated whole, whatever it is called
        if self.split not in splits:
            raise InputError(f"{self.data}: no {self.split} split; there is: {', '.join(sorted(splits))}")
        return splits[self.split]

    def _length(self, trained: TrainedModel) -> int:
        positions = trained.model.config.positions
        positions.require(self.length)
        return self.length or positions.limit or UNLIMITED_LENGTH
