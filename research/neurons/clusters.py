"""Whether the clusters that a similarity makes are the groups that somebody published."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from ... import InputError


class Recovered(NamedTuple):
    """Adjusted Rand index of clusters and groups, and how often groups dealt anew reach as much."""

    rand: float
    p: float


def tree(similarity: np.ndarray) -> Any:
    """The average-linkage tree of N things (scipy's form `[N - 1, 4]`) whose `similarity [N, N]` is given."""
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1] or len(similarity) < 2:
        raise InputError(f"a similarity of shape {similarity.shape}; clusters need [N, N] of at least two")
    alike = (similarity + similarity.T) / 2
    distance = np.clip(alike.max() - alike, 0, None)
    np.fill_diagonal(distance, 0)
    return linkage(squareform(distance, checks=False), "average")


def clusters(similarity: np.ndarray, count: int) -> np.ndarray:
    """Numbers `[N]` of at most `count` clusters."""
    return fcluster(tree(similarity), count, "maxclust")


def adjusted_rand(one: Sequence[Any] | np.ndarray, two: Sequence[Any] | np.ndarray) -> float:
    """Agreement of two partitions of the same things: 1 the same, 0 chance (Hubert and Arabie, 1985)."""
    rows, columns = (np.unique(np.asarray(each), return_inverse=True)[1] for each in (one, two))
    table = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(table, (rows, columns), 1)

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    both, first, second = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = first * second / pairs(table.sum())
    most = (first + second) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def recovered(similarity: np.ndarray, groups: Sequence[str], draws: int = 2000, seed: int = 0) -> Recovered:
    """How well as many clusters as there are groups agree with these; p by permuting who is in which."""
    kinds, named = np.unique(np.asarray(groups), return_inverse=True)
    found = clusters(similarity, len(kinds))
    observed = adjusted_rand(found, named)
    numbers = np.random.default_rng(seed)
    dealt = [adjusted_rand(found, numbers.permutation(named)) for _ in range(draws)]
    return Recovered(observed, (1 + sum(each >= observed - 1e-12 for each in dealt)) / (1 + draws))
