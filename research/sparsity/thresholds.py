"""Training-free thresholds: what is small is set to zero, at the level that leaves a wanted share.

CATS (Lee et al., 2024) zeroes small outputs of a gated layer's activation function, one threshold a layer;
TEAL (Liu et al., 2024) does so at the input of every product, for which the sites are named. Both read the
threshold off the sizes of a sample. Nothing is trained and no weight changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ... import InputError
from ...models.hooks import Given, run_with_cache
from ...models.model import Model, Params
from .statistics import Batch, real_tokens, transformer_inputs

ACTIVATIONS = ("mlp/act",)  # CATS; TEAL's are the inputs of products, such as mlp_norm and mlp/mid
LOWEST, HIGHEST, STEPS = -20.0, 12.0, 64  # powers of two, and steps of each


@dataclass(frozen=True)
class Thresholds:
    """For each site, by path, the size below which values are zeroed; stacked `[L]` under scanned layers."""

    keep: float
    values: Mapping[str, np.ndarray]

    def edits(self) -> dict[str, Given]:
        """For `run_with_edits`: the sites with small values at zero."""
        return {path: Given(_cut, {path: value}) for path, value in self.values.items()}


def find_thresholds(
    model: Model,
    params: Params,
    batches: Iterable[Batch],
    keep: float,
    names: Sequence[str] = ACTIVATIONS,
) -> Thresholds:
    """Thresholds that leave the share `keep` of the values of each site that `names` match.

    Sizes are counted in bins of 1/64 of a power of two; values that are 0 already count as zeroed. Raises
    `InputError` for a share outside of ]0, 1], for no batches, and for names that match nothing.
    """
    if not 0.0 < keep <= 1.0:
        raise InputError(f"keep={keep} of the values must be above 0 and at most 1")

    @jax.jit
    def count(params: Params, batch: Batch) -> dict[str, jax.Array]:
        args, kwargs = transformer_inputs(batch)
        counted = partial(_counted, batch)
        return run_with_cache(model, params, *args, names=list(names), reduce=counted, **kwargs)[1]

    total: dict[str, np.ndarray] = {}
    for batch in batches:
        for path, counts in jax.device_get(count(params, dict(batch))).items():
            total[path] = total.get(path, 0) + counts.astype(np.int64)
    if not total:
        raise InputError("no batches to find thresholds on")
    return Thresholds(keep, {path: _level(counts, keep) for path, counts in total.items()})


def _cut(value: jax.Array, threshold: Any) -> jax.Array:
    small = jnp.abs(value) < jnp.asarray(threshold, value.dtype)  # what is no number stays so
    return jnp.where(small, 0, value)


def _counted(batch: Batch, path: str, value: jax.Array) -> jax.Array:
    """How many sizes lie in each bin; those of padding in none."""
    real = jnp.broadcast_to(real_tokens(batch, path), value.shape[:-1])
    power = jnp.log2(jnp.abs(value.astype(jnp.float32)))  # of 0: -inf, the lowest bin
    bins = int(HIGHEST - LOWEST) * STEPS
    place = jnp.clip((power - LOWEST) * STEPS, 0, bins - 1).astype(jnp.int32)
    place = jnp.where(real[..., None], place, bins)
    return jnp.zeros(bins, jnp.int32).at[place.ravel()].add(1, mode="drop")


def _level(counts: np.ndarray, keep: float) -> np.ndarray:
    """The lower edge of the bin from which on the share lies; counts `[..., bins]`."""
    above = np.cumsum(counts[..., ::-1], -1)[..., ::-1] / counts.sum(-1, keepdims=True)
    place = np.maximum((above >= keep).sum(-1) - 1, 0)
    return np.where(place > 0, 2.0 ** (LOWEST + place / STEPS), 0.0).astype(np.float32)
