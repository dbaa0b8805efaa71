"""`modicum train DATA`: a language model from text."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from ... import InputError
from .options import PlacementOptions, TrainingOptions

if TYPE_CHECKING:
    from ...models.config import TransformerConfig
    from ...parallel.layout import Layout
    from ...research.data.packing import Packed
    from ...research.data.sources import Source
    from ...research.data.tokenizers import Tokenizer
    from ...research.study.runs import Run
    from ...research.training.activation_penalty import ActivationPenalty
    from ...research.training.config import TrainingConfig


@dataclass(frozen=True)
class TrainRun:
    """What a training run is asked for: its identity is hashed from this, but for what saves memory.

    Not where it runs: the mesh does not change the result, and a run may go on on another one.
    """

    model: TransformerConfig
    training: TrainingConfig
    tokenizer: str
    length: int
    holdout: float

    def asked(self) -> TrainRun:
        """The same without what changes memory alone: fewer devices may need `--remat` or `--offload`."""
        training = replace(self.training, loss_chunk=None, offload=False)
        return replace(self, model=replace(self.model, remat="none"), training=training)

    def memory(self) -> dict[str, Any]:
        """What `asked` leaves out, for the run's environment record."""
        training = self.training
        return {"remat": self.model.remat, "loss_chunk": training.loss_chunk, "offload": training.offload}


@dataclass(frozen=True)
class PricedRun(TrainRun):
    """One whose activations have a price; a class of its own, so that other runs keep their identities."""

    penalty: ActivationPenalty


@dataclass(frozen=True)
class Train:
    """Train a language model on text.

    Writes a run folder: metrics, checkpoints and, at the end, the model with its tokenizer. Started again, a
    stopped run goes on and a finished one does nothing.
    """

    data: tyro.conf.Positional[str]
    """A file (JSONL, JSON, CSV, TSV, Parquet, text), a folder with train and dev files, or a hub name."""
    out: Path = Path("runs/train")
    """Folder of the run."""
    preset: str = "quick"
    """The model's shape, by name; its vocabulary is the tokenizer's."""
    activation: str = ""
    """Of the feed-forward layers, instead of the preset's: relu, relu2, gelu, silu, fatrelu:0.1, topk:32,
    statistical-topk:32; or drelu, of gated layers (such as modern-tiny's): ReLU on both products."""
    price: float = 0.0
    """Of the mean size of an activation, added to the loss: rises over the first half of the steps."""
    text_column: str = "text"
    tokenizer: Path | None = None
    """A tokenizer.json; without one, byte-pair encoding is trained on the data."""
    vocab: int = 2048
    """Size of the tokenizer to train."""
    length: int = 128
    """Tokens of a row."""
    holdout: float = 0.05
    """Fraction of the rows to evaluate on, where the data has no dev split."""
    scan: bool = False
    """Compile one layer and scan it: for deep models."""
    remat: str = "none"
    """What the backward pass computes again: none, dots (all but products), mlp, middle, full, offload; or of
    runs of layers, such as full:8,none:4."""
    offload: bool = False
    """Keep the optimizer's state in the host's memory."""
    loss_chunk: int | None = None
    """Tokens whose logits a device holds at a time; 0: all of its tokens; None: as 256 MiB have room for."""
    learning_rate: float = 1e-3
    training: TrainingOptions = field(default_factory=TrainingOptions)
    placement: PlacementOptions = field(default_factory=PlacementOptions)

    def run(self) -> int:
        """Train, and store the model."""
        from ...models import Transformer
        from ...parallel.processes import is_main, main_first
        from ...research.study.runs import Run
        from .progress import say

        training = self.training.config(self.learning_rate, "loss")
        training = replace(training, loss_chunk=self.loss_chunk, offload=self.offload)
        shape = self._shape()
        layout = self.placement.layout(training.batch).for_causal(self.length)
        layout = layout.for_layers(shape.layers // shape.period)
        splits = self._splits()
        tokenizer = self._tokenizer(splits["train"])
        config = replace(shape, vocab=tokenizer.vocab)
        question = self._question(config, training, tokenizer)
        fingerprint = "-".join(source.fingerprint for source in splits.values())
        with main_first("opened"):
            run = Run.open(
                self.out.parent,
                question.asked(),
                seed=self.training.seed,
                data_fingerprint=fingerprint,
                name=self.out.name,
                devices=describe_devices(layout) | question.memory(),
                write=is_main(),
            )
        if run.state == "finished":
            say(f"{run.folder}: finished before, nothing to do; evaluation loss {run.result['loss']:.4f}")
            return 0
        with run.unless_refused():
            with main_first("packed"):
                train_rows, dev_rows = self._rows(splits, tokenizer, run)
            return self._train(run, question, Transformer(config), tokenizer, train_rows, dev_rows, layout)

    def _train(
        self,
        run: Run,
        question: TrainRun,
        model: Any,
        tokenizer: Tokenizer,
        train_rows: Any,
        dev_rows: Any,
        layout: Layout,
    ) -> int:
        from ...models.costs import parameter_count
        from ...parallel.batches import on_host
        from ...parallel.processes import is_main
        from ...research.training.evaluation import perplexity
        from ...research.training.loop import train
        from ...research.training.model_folder import save_model
        from ...research.training.tasks import language_model_job
        from .progress import say, training_bar
        from .stops import exit_code

        penalty = question.penalty if isinstance(question, PricedRun) else None
        job = language_model_job(
            model, train_rows, question.training, layout=layout, evaluation=dev_rows, penalty=penalty
        )
        size = f"{len(train_rows):,} rows of {self.length} tokens"
        say(f"{run.folder}: {parameter_count(model):,} parameters, {size}")
        with training_bar("training", question.training.steps) as report:
            outcome = train(job, question.training, run, layout=layout, report=report)
        if code := exit_code(outcome, run.folder):
            return code
        best = next(e for e in outcome.evaluations if e["step"] == int(outcome.best.step))
        params = on_host(outcome.best.evaluated)
        if is_main():
            save_model(run.folder / "model", model, params, tokenizer=tokenizer)
        result = {**best, "perplexity": perplexity(best["loss"]), "parameters": parameter_count(model)}
        run.finish(result)
        say(
            f"{run.folder}: best at step {best['step']}: evaluation loss {best['loss']:.4f} nats a token, "
            f"perplexity {result['perplexity']:.2f}, next-token accuracy {best['accuracy']:.1%}; "
            f"the model is in {run.folder / 'model'}"
        )
        return 0

    def _shape(self) -> TransformerConfig:
        """The preset with what was chosen for it."""
        from ...models.activations import change_activation, parse_activation
        from ...models.precision import policy
        from ...models.presets import preset

        shape = preset(self.preset)
        if shape.kind != "decoder":
            raise InputError(f"preset {self.preset!r} is an {shape.kind}; a language model is a decoder")
        shape.positions.require(self.length)
        if self.activation:
            shape = change_activation(shape, parse_activation(self.activation))
        precision = policy(self.training.precision)
        return replace(shape, precision=precision, scan=self.scan or shape.scan, remat=self.remat)

    def _question(
        self, config: TransformerConfig, training: TrainingConfig, tokenizer: Tokenizer
    ) -> TrainRun:
        """What the run's identity is of; with the schedule of the activations' price, where they have one."""
        from ...models.activations import neurons_of
        from ...research.training.activation_penalty import ActivationPenalty

        asked = config, training, tokenizer.fingerprint, self.length, self.holdout
        activation = getattr(config.mlp, "activation", "")
        penalty = ActivationPenalty.rising(self.price, training.steps, neurons_of(activation))
        return TrainRun(*asked) if penalty is None else PricedRun(*asked, penalty)

    def _splits(self) -> dict[str, Source]:
        from ...research.data.sources import load_splits

        splits = load_splits(self.data, self.text_column)
        if "train" not in splits:
            raise InputError(f"{self.data}: no train split; there is: {', '.join(splits)}")
        return splits

    def _tokenizer(self, source: Source) -> Tokenizer:
        from ...research.data.tokenizers import Tokenizer, train_tokenizer

        if self.tokenizer is not None:
            return Tokenizer.load(self.tokenizer)
        return train_tokenizer(source.texts(), self.vocab)

    def _rows(self, splits: dict[str, Source], tokenizer: Tokenizer, run: Run) -> tuple[Any, Any]:
        """Packed rows to train on and rows to evaluate on."""
        rows = {
            split: self._pack(source, tokenizer, run) for split, source in splits.items() if split != "test"
        }
        if "dev" in rows:
            return rows["train"], rows["dev"]
        from ...research.data.parts import hold_out

        return hold_out(rows["train"], self.holdout)

    def _pack(self, source: Source, tokenizer: Tokenizer, run: Run) -> Packed:
        from ...research.data.packing import packed_corpus

        return packed_corpus(source.texts(), tokenizer, self.length, run.folder / "data", source.fingerprint)


def describe_devices(layout: Layout) -> dict[str, Any]:
    """What the run's environment record says of the mesh."""
    devices = list(layout.mesh.devices.flat)
    return {"kind": devices[0].device_kind, "count": len(devices), "mesh": dict(layout.mesh.shape)}
