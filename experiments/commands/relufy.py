"""`modicum sparsity MODEL --data DATA --relufy STEPS`: another activation function, and training on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ... import InputError
from .options import refuse_unused

if TYPE_CHECKING:
    from ...models.mlp import Activation
    from ...research.data.completions import Completions
    from ...research.sparsity.relufication import Relufication, Relufied
    from .language_models import LanguageModel


class Cut(NamedTuple):
    """Rows of ids of one source: what is `measured`, the `rest`, and the most tokens that a row has."""

    measured: list[list[int]]
    rest: list[list[int]]
    length: int


@dataclass(frozen=True)
class RelufyOptions:
    """How a model whose neurons are never silent is made one with ReLU."""

    relufy: int = 0
    """Steps of training with another activation function, on rows that are not measured; 0: none."""
    relufy_to: str = "relu"
    """The activation function: relu, relu2, fatrelu:0.1, topk:32, statistical-topk:32; or drelu, of gated
    layers: ReLU on both products (measure --site mid)."""
    teacher: Literal["itself", "text"] = "itself"
    """What it learns: the distribution over the next token that the model had, or the text's next token; a
    body without a head, such as an encoder, the hidden states that it had."""
    price: float = 0.0
    """Of the mean size of an activation, added to the loss: rises over the first half of the steps."""
    learning_rate: float = 1e-4
    batch: int = 8
    """Rows of a training batch."""

    def activation(self) -> Activation:
        """The function to change to; raises `InputError` for one that leaves no neuron silent."""
        from ...models.activations import SILENCING, parse_activation

        return parse_activation(self.relufy_to, SILENCING)

    def require_use(self) -> None:
        """Raise `InputError` for options that are given and that nothing would come of without steps."""
        if self.relufy < 0:
            raise InputError(f"--relufy {self.relufy} must be at least 0 steps")
        if not self.relufy:
            names = [each.name for each in fields(self) if each.name != "relufy"]
            refuse_unused(self, names, "nothing is trained without --relufy STEPS")

    def train(
        self, speaker: LanguageModel, texts: Iterable[Cut], seed: int
    ) -> tuple[LanguageModel, Relufied]:
        """The changed model in the place of the one it was, and its scores on the measured rows."""
        from ...research.sparsity.relufication import relufy, speaks
        from .progress import training_bar

        parts, make = list(texts), _rows if speaks(speaker.model) else _read
        rows, held_out = (
            make([row for part in parts for row in chosen(part)], parts[0].length, speaker.tokenizer.pad)
            for chosen in (lambda part: part.rest, lambda part: part.measured)
        )
        if not len(rows) or not len(held_out):
            raise InputError(
                "--relufy trains on rows that are not measured, of two tokens at least, and there are none: "
                "give more text or fewer --rows"
            )
        with training_bar("relufying", self.relufy) as report:
            made = relufy(speaker.model, speaker.params, rows, held_out, self.wanted(seed), report=report)
        return replace(speaker, model=made.model, params=made.params), made

    def wanted(self, seed: int) -> Relufication:
        """What the library is asked for."""
        from ...models.activations import neurons_of
        from ...research.sparsity.relufication import Relufication
        from ...research.training.activation_penalty import ActivationPenalty
        from ...research.training.config import OptimizerConfig, TrainingConfig

        activation = self.activation()
        penalty = ActivationPenalty.rising(self.price, self.relufy, neurons_of(activation))
        optimizer = OptimizerConfig("adamw", self.learning_rate)
        training = TrainingConfig(self.relufy, self.batch, optimizer=optimizer, seed=seed)
        return Relufication(activation, self.teacher, training, penalty)


def _read(ids: list[list[int]], length: int, pad: int) -> list[dict[str, Any]]:
    """Rows that a body without a head reads, filled up to one length."""
    import numpy as np

    rows = []
    for row in ids:
        segments = (np.arange(length) < len(row)).astype(np.int32)
        tokens = np.asarray([*row, *[pad] * (length - len(row))], np.int32)
        rows.append({"tokens": tokens, "segments": segments, "weights": segments.astype(np.float32)})
    return rows


def _rows(ids: list[list[int]], length: int, pad: int) -> Completions:
    """Rows to continue from their first token on."""
    from ...research.data.completions import Completions, Lengths

    long_enough = [row for row in ids if len(row) > 1]
    return Completions(
        [row[:1] for row in long_enough],
        [row[1:] for row in long_enough],
        [""] * len(long_enough),
        Lengths(length, length),
        pad=pad,
    )
