"""How specialised neurons are: predictivity by average precision, by layer and function against function.

Zhang et al., "Emergent Modularity in Pre-trained Transformers", 2023: a neuron's activations rank sentences;
its predictivity for a function is the average precision of that ranking for sentences that have the
function, or for those that have it not, whichever is larger.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ... import InputError
from .relations import matrix, spearman


def average_precision(values: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """The average precision of ranking N examples by `values [N, ...]`, highest first, for each of the rest.

    Sum over distinct values of (gain in recall) x (precision down to there), so that ties have no order.
    Raises `InputError` where all examples are positive, or none.
    """
    wanted = np.asarray(positive, bool)
    if wanted.shape != values.shape[:1] or wanted.all() or not wanted.any():
        raise InputError(
            f"{int(wanted.sum())} of {wanted.size} examples positive, for values {values.shape}; both kinds "
            f"are needed, one mark an example"
        )
    flat = values.reshape(len(values), -1)
    order = np.argsort(-flat, axis=0, kind="stable")
    ranked, hits = np.take_along_axis(flat, order, 0), wanted[order]
    count = len(flat)
    last = np.ones(flat.shape, bool)
    last[:-1] = ranked[:-1] != ranked[1:]
    ends = np.where(last, np.arange(count)[:, None], count)
    ends = np.minimum.accumulate(ends[::-1], axis=0)[::-1]  # where an example's ties end
    precision = np.cumsum(hits, 0) / np.arange(1, count + 1)[:, None]
    found = (hits * np.take_along_axis(precision, ends, 0)).sum(0) / wanted.sum()
    return found.reshape(values.shape[1:])


def ranked_predictivity(values: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """The larger of the average precisions for positive and for other examples; `values [N, ...]`."""
    marks = np.asarray(positive, bool)
    return np.maximum(average_precision(values, marks), average_precision(values, ~marks))


class Specialisation(NamedTuple):
    """`best` and `mean` `[S, L]` of S functions, `alike [L, S, S]` the rank correlations of two."""

    functions: tuple[str, ...]
    best: np.ndarray
    mean: np.ndarray
    alike: np.ndarray


def specialisation(predictivities: Mapping[str, np.ndarray]) -> Specialisation:
    """How predictive layers are for each function, and how alike functions are in each; arrays `[L, F]`."""
    arrays = list(predictivities.values())
    if not arrays or len({each.shape for each in arrays}) != 1 or arrays[0].ndim != 2:
        raise InputError("specialisation needs predictivities [L, F] of one shape, of one function or more")
    alike = [matrix(predictivities, spearman, layers=[layer]) for layer in range(len(arrays[0]))]
    best, mean = (np.stack([reduce(each, 1) for each in arrays]) for reduce in (np.max, np.mean))
    return Specialisation(tuple(predictivities), best, mean, np.stack(alike))
