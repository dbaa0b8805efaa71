"""How well single neurons tell labels apart: thresholds from training means, accuracy above them.

Wang et al., "Finding Skill Neurons in Pre-trained Transformer-based Language Models", 2022 (arXiv
2211.07349): a neuron's baseline is its mean activation over the training set; on the dev set it "predicts"
the positive label where it is above its baseline; its predictivity is the larger of that accuracy and 1 minus
it. Two streaming passes, of which sums `[C, L, P, F]` are kept and no activations.

Labels of unequal frequency would give a neuron that never fires the majority's share as its accuracy. So both
sides of a task count alike here, as if the larger were down-sampled (`balanced=False`: as printed).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ... import InputError
from .reading import Batch, Reader


@dataclass(frozen=True)
class Subtask:
    """A question with two answers: whether the label is among `positive` or among `negative` ids."""

    positive: tuple[int, ...]
    negative: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.positive or not self.negative or set(self.positive) & set(self.negative):
            raise InputError(
                f"a subtask needs two sets of labels without a common one, not {self.positive} and "
                f"{self.negative}"
            )


def one_against_rest(labels: int) -> tuple[Subtask, ...]:
    """A task of two labels as one subtask, of C > 2 as C subtasks."""
    if labels < 2:
        raise InputError(f"a task of {labels} label has nothing to tell apart")
    if labels == 2:
        return (Subtask((1,), (0,)),)
    return tuple(
        Subtask((label,), tuple(other for other in range(labels) if other != label))
        for label in range(labels)
    )


class Top(NamedTuple):
    """One neuron at one position, whether it is high for the positive side, and its accuracy where chosen."""

    layer: int
    position: int
    neuron: int
    high: bool
    accuracy: float


@dataclass(frozen=True, eq=False)
class Accuracy:
    """The share of examples that "above its baseline" puts on the right side, `values [S, L, P, F]`."""

    values: np.ndarray

    @property
    def predictivity(self) -> np.ndarray:
        """The accuracy of the neuron or of its opposite, `[S, L, P, F]`, at least 0.5."""
        return np.maximum(self.values, 1 - self.values)

    def by_neuron(self) -> np.ndarray:
        """The best over positions, `[S, L, F]`."""
        return self.predictivity.max(2)

    def top(self, subtask: int = 0) -> Top:
        """The most predictive neuron of a subtask; of equal ones the first."""
        layer, position, neuron = np.unravel_index(self.predictivity[subtask].argmax(), self.values.shape[1:])
        value = float(self.values[subtask, layer, position, neuron])
        return Top(int(layer), int(position), int(neuron), value >= 0.5, max(value, 1 - value))

    def of(self, top: Top, subtask: int = 0) -> float:
        """The accuracy that a neuron chosen elsewhere, with its direction, has here."""
        value = float(self.values[subtask, top.layer, top.position, top.neuron])
        return value if top.high else 1 - value


class Predictivity:
    """The two passes for one reader and one list of subtasks, each compiled once.

    Batches have `label [B]` and, where rows only fill the last one, `weight [B]`.
    """

    def __init__(self, reader: Reader, subtasks: tuple[Subtask, ...], balanced: bool = True) -> None:
        self.subtasks, self.balanced = subtasks, balanced
        self._sums = jax.jit(partial(_side_sums, reader, subtasks))
        self._above = jax.jit(partial(_above, reader, subtasks))

    def thresholds(self, arrays: Any, batches: Iterable[Batch]) -> np.ndarray:
        """Baselines `[S, L, P, F]`: mean activations over the examples of a subtask.

        Raises `InputError` where a side of a subtask has no examples, or activations are not finite.
        """
        sums, counts = self._total(lambda batch: self._sums(arrays, batch), batches)
        if not np.isfinite(sums).all():
            raise InputError(f"{(~np.isfinite(sums)).sum()} sums of activations are not finite")
        weights = _shaped(1 / (2 * counts) if self.balanced else 1 / counts.sum(0, keepdims=True))
        return (sums * weights).sum(0).astype(np.float32)

    def accuracy(self, arrays: Any, batches: Iterable[Batch], thresholds: np.ndarray) -> Accuracy:
        """How well each neuron tells the examples of each subtask apart."""
        given = jnp.asarray(thresholds)
        above, counts = self._total(lambda batch: self._above(arrays, batch, given), batches)
        high, low = above[0], _shaped(counts)[1] - above[1]
        if self.balanced:
            return Accuracy((high / _shaped(counts)[0] + low / _shaped(counts)[1]) / 2)
        return Accuracy((high + low) / _shaped(counts).sum(0))

    def _total(self, count: Any, batches: Iterable[Batch]) -> tuple[np.ndarray, np.ndarray]:
        """Sums over batches in double precision: of a pass `[2, S, L, P, F]`, of examples `[2, S]`."""
        total: list[np.ndarray] = []
        for batch in batches:
            found = [np.asarray(part, np.float64) for part in jax.device_get(count(dict(batch)))]
            total = [a + b for a, b in zip(total, found)] if total else found
        if not total:
            raise InputError("no batches to read neurons on")
        for side, counts in zip(("positive", "negative"), total[1]):
            if (counts == 0).any():
                subtask = self.subtasks[int(counts.argmin())]
                raise InputError(f"no example has a {side} label of {subtask}; give data that has both")
        return total[0], total[1]


def _side_sums(
    reader: Reader, subtasks: tuple[Subtask, ...], arrays: Any, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Sums of activations on both sides of each subtask, and how many examples are on each."""
    sides = _sides(subtasks, batch)
    return jnp.einsum("xsb,blpf->xslpf", sides, reader(arrays, batch)), sides.sum(-1)


def _above(
    reader: Reader, subtasks: tuple[Subtask, ...], arrays: Any, batch: Batch, thresholds: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How many examples on both sides of each subtask are above its thresholds."""
    sides, found = _sides(subtasks, batch), reader(arrays, batch)

    def one(given: tuple[jax.Array, jax.Array]) -> jax.Array:
        side, threshold = given
        return jnp.einsum("xb,blpf->xlpf", side, (found > threshold).astype(jnp.float32))

    counts = jax.lax.map(one, (jnp.moveaxis(sides, 1, 0), thresholds))
    return jnp.moveaxis(counts, 0, 1), sides.sum(-1)


def _sides(subtasks: tuple[Subtask, ...], batch: Batch) -> jax.Array:
    """Weights `[2, S, B]` of the examples: first as positive, then as negative ones."""
    label = jnp.asarray(batch["label"])
    weight = jnp.asarray(batch.get("weight", jnp.ones(label.shape)), jnp.float32)
    rows = [
        jnp.stack([jnp.isin(label, jnp.asarray(ids)) for ids in (subtask.positive, subtask.negative)])
        for subtask in subtasks
    ]
    return jnp.stack(rows, 1) * weight


def _shaped(counts: np.ndarray) -> np.ndarray:
    """`[2, S]` as `[2, S, 1, 1, 1]`."""
    return counts[:, :, None, None, None]
