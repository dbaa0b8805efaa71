"""`modicum evaluate MODEL --data DATA`: what a stored model or delta scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from ... import InputError
from .language_models import is_published
from .options import UNLIMITED_LENGTH

WINDOWS, TOKENS = 8, 8192  # that are read at once: as many windows as have no more tokens

if TYPE_CHECKING:
    from ...research.data.sources import Source
    from ...research.data.tokenizers import Tokenizer
    from ...research.training.model_folder import TrainedModel
    from .language_models import LanguageModel


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a model, or a delta on its model.

    A language model gets loss, perplexity and next-token accuracy; a classifier, or a model with a
    classifier's delta, gets loss and accuracy. A published language model, or one with --stride, gets the
    perplexity of all texts as one, joined by empty lines, under a window that slides over it.
    """

    model: tyro.conf.Positional[Path]
    """A model folder, a finished run, or a published checkpoint's folder; under a delta, its backbone."""
    data: str
    """A file, a folder with splits, or a hub name."""
    delta: Path | None = None
    """A delta folder, or a finished run of `modicum tune`."""
    split: Literal["train", "dev", "test"] = "test"
    text_column: str = "text"
    label_column: str = "label"
    length: int = 0
    """Tokens of a row or longest text; 0: as many as the model has positions. Where these have no limit it is
    128, and of a published model to be given."""
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
        if self.stride or is_published(str(self.model)):
            self._sliding()
            return 0
        trained = load_model(find_model(self.model))
        tokenizer = load_tokenizer(trained, self.model)
        if self.delta is None and not trained.labels:
            means = self._language_model(trained, tokenizer)
            means["perplexity"] = perplexity(means["loss"])
        else:
            means = self._classifier(trained, tokenizer)
        print("  ".join(f"{name} {value:.4f}" for name, value in means.items()))
        return 0

    def _sliding(self) -> None:
        from ...research.evaluation import strided_perplexity
        from .language_models import open_language_model

        if self.delta is not None:
            raise InputError("--stride and published models are evaluated without --delta so far")
        speaker = open_language_model(str(self.model), "float32", self.ignore)
        if speaker.pretrained is not None and speaker.pretrained.prepares:
            name = speaker.pretrained.architecture
            raise InputError(
                f"{self.model} holds a {name}, which reads a text behind a prompt; it is not evaluated"
            )
        window = self._window(speaker)
        text = "\n\n".join(self._source(None).texts())
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

        source = self._source(None)
        rows = pack(
            tokenizer.encode(list(source.texts())), self._length(trained), tokenizer.eos, pad=tokenizer.pad
        )
        loss = language_modelling(full_tuning(trained.model))
        means = evaluation_of(make_evaluation(loss), rows, Layout.single())
        assert means is not None
        return means(trained.params, {})

    def _classifier(self, trained: TrainedModel, tokenizer: Tokenizer) -> dict[str, Any]:
        from ...parallel.layout import Layout
        from ...research.data.examples import Labels, examples
        from ...research.training.evaluation import make_evaluation
        from ...research.training.objectives import classification, delta_tuning, full_tuning
        from ...research.training.tasks import evaluation_of
        from ...research.training.tuning import load_tuned

        if self.delta is None:
            forward, trainable, frozen = full_tuning(trained.model), trained.params, {}
            labels = trained.labels
        else:
            tuned, variables, params, labels = load_tuned(find_delta(self.delta), trained)
            forward, trainable = delta_tuning(tuned), variables["delta"]
            frozen = {"params": params, "delta_state": variables["delta_state"]}
        source = self._source(self.label_column)
        rows = examples(source, tokenizer, Labels(labels), self._length(trained), truncate=self.truncate)
        means = evaluation_of(make_evaluation(classification(forward)), rows, Layout.single())
        assert means is not None
        return means(trainable, frozen)

    def _source(self, label_column: str | None) -> Source:
        from ...research.data.sources import load_splits

        splits = load_splits(self.data, self.text_column, label_column)
        if list(splits) == ["train"] and Path(self.data).is_file():
            return splits["train"]  # one file is evaluated whole, whatever it is called
        if self.split not in splits:
            raise InputError(f"{self.data}: no {self.split} split; there is: {', '.join(sorted(splits))}")
        return splits[self.split]

    def _length(self, trained: TrainedModel) -> int:
        positions = trained.model.config.positions
        positions.require(self.length)
        return self.length or positions.limit or UNLIMITED_LENGTH


def find_delta(path: Path) -> Path:
    """The delta folder at `path`: itself, or the `delta` of a finished run."""
    for folder in (path, path / "delta"):
        if (folder / "delta.json").is_file():
            return folder
    if (path / "model" / "model.json").is_file():
        raise InputError(f"{path} holds a whole model, no delta: evaluate {path} itself, without --delta")
    raise InputError(f"{path} holds no delta.json; give a delta folder or a finished run of `modicum tune`")
