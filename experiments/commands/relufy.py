"""`modicum sparsity MODEL --data DATA --relufy STEPS`: another activation function, and training on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from ... import InputError

if TYPE_CHECKING:
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
    relufy_to: Literal["relu", "relu2", "drelu"] = "relu"
    """The activation function; drelu is of gated layers: ReLU on both products (measure --site mid)."""
    teacher: Literal["itself", "text"] = "itself"
    """What it learns: the distribution over the next token that the model had, or the text's next token."""
    price: float = 0.0
    """Of the mean size of an activation, added to the loss: rises over the first half of the steps."""
    learning_rate: float = 1e-4
    batch: int = 8
    """Rows of a training batch."""

    def train(
        self, speaker: LanguageModel, texts: Iterable[Cut], seed: int
    ) -> tuple[LanguageModel, Relufied]:
        """The changed model in the place of the one it was, and its losses on the measured rows."""
        from ...research.sparsity.relufication import relufy
        from .progress import training_bar

        parts = list(texts)
        rows, held_out = (
            _rows([row for part in parts for row in chosen(part)], parts[0].length, speaker.tokenizer.pad)
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
        from ...research.sparsity.relufication import Relufication
        from ...research.training.activation_penalty import ActivationPenalty
        from ...research.training.config import OptimizerConfig, TrainingConfig

        site = "mlp/mid" if self.relufy_to == "drelu" else "mlp/act"
        half = max(1, self.relufy // 2)
        penalty = ActivationPenalty(((0, 0.0), (half, self.price)), site) if self.price else None
        optimizer = OptimizerConfig("adamw", self.learning_rate)
        training = TrainingConfig(self.relufy, self.batch, optimizer=optimizer, seed=seed)
        return Relufication(self.relufy_to, self.teacher, training, penalty)


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
