"""Whether neurons of one function lie together in experts, and when in training they settle.

Zhang et al., "Emergent Modularity in Pre-trained Transformers", 2023: a function's neurons are the top few by
predictivity; an expert (`research.sparsity` makes them) is functional where it has more of them than a draw
without replacement explains, by a hypergeometric test. Random partitions of the same sizes are the control.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy.stats import binom, hypergeom

from ... import InputError
from .relations import spearman

LEVEL = 0.001  # the paper's


class Modularity(NamedTuple):
    """How concentrated chosen neurons are in experts.

    `functional [L, E]` says which experts have too many of them for chance, `share` is the part of all
    experts that are, `together` how likely two chosen neurons of a layer are in one expert, `random` the same
    in the mean over random partitions, `p` how often these reach as much.
    """

    functional: np.ndarray
    share: float
    together: float
    random: float
    p: float


def expert_counts(chosen: np.ndarray, experts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Chosen neurons in each expert and its size, `[L, E]`; `experts [L, F]` are numbers from 0 on."""
    if chosen.shape != experts.shape or experts.min() < 0:
        raise InputError(
            f"chosen neurons {chosen.shape} and experts {experts.shape} must be of one shape [L, F], experts "
            f"numbered from 0"
        )
    count = int(experts.max()) + 1
    each = experts[..., None] == np.arange(count)
    return (each & chosen[..., None]).sum(1), each.sum(1)


def enrichment(chosen: np.ndarray, experts: np.ndarray) -> np.ndarray:
    """p-values `[L, E]`: the probability of as many chosen neurons in an expert of its size by chance."""
    counts, sizes = expert_counts(chosen, experts)
    width, total = chosen.shape[1], chosen.sum(1, keepdims=True)
    return hypergeom.sf(counts - 1, width, total, sizes)


def modularity(
    chosen: np.ndarray, experts: np.ndarray, *, level: float = LEVEL, draws: int = 200, seed: int = 0
) -> Modularity:
    """Functional experts of `chosen [L, F]` in the partition `experts [L, F]`, beside random partitions.

    Raises `InputError` where no layer has two chosen neurons, of which alone anything could be said.
    """
    if not (chosen.sum(1) > 1).any():
        raise InputError("modularity needs at least two chosen neurons in a layer")
    functional = enrichment(chosen, experts) <= level
    observed = _together(chosen, experts)
    numbers = np.random.default_rng(seed)
    found = [_together(chosen, numbers.permuted(experts, axis=1)) for _ in range(draws)]
    p = (1 + sum(each >= observed - 1e-12 for each in found)) / (1 + draws)
    return Modularity(functional, float(functional.mean()), observed, float(np.mean(found)), p)


def of_function(functional: np.ndarray, level: float = LEVEL) -> np.ndarray:
    """p-values `[L, E]` of a function with S sub-functions, whose experts are `functional [S, L, E]`.

    The probability that chance, which makes an expert functional at rate `level`, does so as often.
    """
    if functional.ndim != 3:
        raise InputError(f"functional experts of sub-functions must be [S, L, E], not {functional.shape}")
    return binom.sf(functional.sum(0) - 1, len(functional), level)


def densest(chosen: np.ndarray, experts: np.ndarray, count: int) -> np.ndarray:
    """All neurons `[L, F]` of the `count` experts of each layer with most of the `chosen [L, F]`."""
    counts, sizes = expert_counts(chosen, experts)
    shares = counts / np.maximum(sizes, 1)
    return _neurons_of(np.argsort(-shares, axis=1, kind="stable"), experts, count)


def random_experts(experts: np.ndarray, count: int, seed: int) -> np.ndarray:
    """All neurons `[L, F]` of `count` random experts of each layer: the control of `densest`."""
    total, numbers = int(experts.max()) + 1, np.random.default_rng(seed)
    return _neurons_of(np.stack([numbers.permutation(total) for _ in experts]), experts, count)


def expert_means(values: np.ndarray, experts: np.ndarray) -> np.ndarray:
    """The mean of `values [L, F]` over each expert's neurons, `[L, E]`; 0 for an expert without any."""
    sizes = expert_counts(np.ones(experts.shape, bool), experts)[1]
    sums = [np.bincount(row, each, sizes.shape[1]) for row, each in zip(experts, values)]
    return np.asarray(sums) / np.maximum(sizes, 1)


def stability(checkpoints: Sequence[np.ndarray], experts: np.ndarray | None = None) -> np.ndarray:
    """Spearman correlation `[N - 1, L]` of predictivities `[L, F]` between one checkpoint and the next.

    With `experts [L, F]`, of the experts' means: do modules settle before their neurons do?
    """
    if len(checkpoints) < 2:
        raise InputError(f"{len(checkpoints)} checkpoint; stability compares each with the next")
    values = [each if experts is None else expert_means(each, experts) for each in checkpoints]
    return np.asarray([[spearman(a, b) for a, b in zip(one, two)] for one, two in pairwise(values)])


def _neurons_of(order: np.ndarray, experts: np.ndarray, count: int) -> np.ndarray:
    """Which neurons are in the first `count` experts with neurons of each layer's `order [L, E]`."""
    sizes = expert_counts(np.ones(experts.shape, bool), experts)[1]
    empty = np.take_along_axis(sizes == 0, order, 1)
    least = int((~empty).sum(1).min())  # a ragged partition's layers may have fewer
    if not 0 < count <= least:
        raise InputError(f"{count} experts of {least}; at least one and at most all can be chosen")
    first = np.take_along_axis(order, np.argsort(empty, axis=1, kind="stable"), 1)[:, :count]
    return (experts[..., None] == first[:, None]).any(-1)


def _together(chosen: np.ndarray, experts: np.ndarray) -> float:
    """Of pairs of chosen neurons of a layer, the share in one expert, over all layers."""
    counts, total = expert_counts(chosen, experts)[0], chosen.sum(1)
    return float((counts * (counts - 1)).sum() / (total * (total - 1)).sum())
