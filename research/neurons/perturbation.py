"""What a model loses without some of its neurons, beside what it loses without as many others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ... import InputError
from .interventions import Intervention, for_each
from .reading import Batch

Logits = Callable[[Any, Batch, Intervention, jax.Array], jax.Array]


class Interval(NamedTuple):
    """A mean and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        mean, low, high = (value + 0.0 for value in self)  # no minus before a zero
        return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


class Perturbed:
    """Which examples a classifier gets right under each of many interventions, compiled once.

    `logits(arrays, batch, intervention, rng)` is the model, pure; see `intervene`.
    """

    def __init__(self, logits: Logits, chunk: int = 1) -> None:
        self._correct = jax.jit(partial(_correct, logits, chunk))

    def __call__(
        self, arrays: Any, batches: Iterable[Batch], interventions: Intervention, seed: int = 0
    ) -> np.ndarray:
        """Booleans `[M, N]` of M interventions (arrays `[M, L, F]`) and N examples; one noise for all M."""
        rng, found = jax.random.key(seed), []
        for number, batch in enumerate(batches):
            key = jax.random.fold_in(rng, number)
            correct = np.asarray(self._correct(arrays, dict(batch), interventions, key))
            found.append(correct[:, np.asarray(batch.get("weight", np.ones(correct.shape[1]))) > 0])
        if not found:
            raise InputError("no examples to measure a perturbed model on")
        return np.concatenate(found, 1)


def bootstrap(differences: np.ndarray, seed: int = 0, resamples: int = 2000, level: float = 0.95) -> Interval:
    """The mean of `differences` with its percentile interval over what could have been drawn otherwise.

    `[N]`: examples are resampled (Efron, 1979). `[R, N]`: so are the R random draws that examples were
    compared with, independently of them ("The pigeonhole bootstrap", Owen, 2007). `[S, R, N]`: so are S
    seeds, each with draws of its own, of the same examples. Intervals are too wide where the noise is of each
    draw and example, and too narrow where few draws or seeds differ more than examples do: of two such seeds
    half of the 95% intervals miss, of three a quarter, of eight draws a tenth. Of one, nothing is known.
    """
    if differences.ndim not in (1, 2, 3) or differences.size == 0:
        raise InputError(f"differences have shape {differences.shape}; resampled are [N], [R, N], [S, R, N]")
    table = differences.reshape((1,) * (3 - differences.ndim) + differences.shape)
    numbers, (trainings, draws, examples) = np.random.default_rng(seed), table.shape

    def resampled(count: int, *sets: int) -> np.ndarray:
        return numbers.multinomial(count, np.full(count, 1 / count), sets) / count

    seeds, drawn = resampled(trainings, resamples), resampled(draws, resamples, trainings)
    means = np.einsum("bs,bsr,bn,srn->b", seeds, drawn, resampled(examples, resamples), table, optimize=True)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(differences.mean()), float(low), float(high))


def _correct(
    logits: Logits, chunk: int, arrays: Any, batch: Batch, interventions: Intervention, rng: jax.Array
) -> jax.Array:
    label = jnp.asarray(batch["label"])
    return for_each(
        lambda one: logits(arrays, batch, one, rng).argmax(-1) == label, interventions, chunk=chunk
    )
