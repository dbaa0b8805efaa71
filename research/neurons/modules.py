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
from scipy.stats import hypergeom

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


def stability(checkpoints: Sequence[np.ndarray]) -> np.ndarray:
    """Spearman correlation `[N - 1, L]` of predictivities `[L, F]` between one checkpoint and the next."""
    if len(checkpoints) < 2:
        raise InputError(f"{len(checkpoints)} checkpoint; stability compares each with the next")
    return np.asarray([[spearman(a, b) for a, b in zip(one, two)] for one, two in pairwise(checkpoints)])


def _together(chosen: np.ndarray, experts: np.ndarray) -> float:
    """Of pairs of chosen neurons of a layer, the share in one expert, over all layers."""
    counts, total = expert_counts(chosen, experts)[0], chosen.sum(1)
    return float((counts * (counts - 1)).sum() / (total * (total - 1)).sum())
