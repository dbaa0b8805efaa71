"""How alike two tasks are by the neurons that serve them, and whether that says more than chance.

Two families of measures. Of predictivities: Spearman's rank correlation between tasks, layer by layer
(Wang et al., 2022). Of what prompts switch on: the overlap of activated neurons of one model under two
prompts, on the same texts (Su et al., "On Transferability of Prompt Tuning", 2022), as cosine of raw
activations, cosine of binary states, Jaccard index of binary states, and overlap of the k most active.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from ... import InputError

Measure = Callable[[np.ndarray, np.ndarray], float]
TOP = 0.1  # of neurons, in `top_overlap`


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two vectors, ties sharing their mean rank; 0 where one is constant."""
    one, two = rankdata(a.reshape(-1)), rankdata(b.reshape(-1))
    one, two = one - one.mean(), two - two.mean()
    size = float(np.sqrt((one @ one) * (two @ two)))
    return float(one @ two) / size if size else 0.0


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of raw activations."""
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a.reshape(-1) @ b.reshape(-1)) / size if size else 0.0


def binary_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of the states "active" (above 0) and "not active"."""
    return cosine((a > 0).astype(np.float64), (b > 0).astype(np.float64))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Neurons active in both, of those active in one."""
    either = ((a > 0) | (b > 0)).sum()
    return float(((a > 0) & (b > 0)).sum() / either) if either else 0.0


def top_overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Of the tenth of neurons that is most active in one, the share that is so in the other."""
    count = max(1, round(TOP * a.size))
    one, two = (set(np.argsort(-each.reshape(-1), kind="stable")[:count]) for each in (a, b))
    return len(one & two) / count


OVERLAPS: Mapping[str, Measure] = {
    "cosine": cosine,
    "binary cosine": binary_cosine,
    "Jaccard": jaccard,
    "top 10%": top_overlap,
}


def matrix(
    of: Mapping[str, np.ndarray],
    measure: Measure,
    layers: Sequence[int] | None = None,
    among: Mapping[str, np.ndarray] | None = None,
) -> np.ndarray:
    """`measure` of each two tasks `[N, N]`, in the mean over layers of their arrays `[L, ..., F]`.

    `among` are neurons `[L, F]` of each task, such as its skill neurons: only those of either task of a pair
    are compared (the "transferability indicator" of Wang et al., 2022, takes the top fifth).
    """
    names = list(of)
    chosen = range(len(of[names[0]])) if layers is None else layers
    values = np.ones((len(names), len(names)))
    for first, second in itertools.combinations_with_replacement(range(len(names)), 2):
        a, b = names[first], names[second]
        each = []
        for layer in chosen:
            kept = ... if among is None else (..., among[a][layer] | among[b][layer])
            each.append(measure(of[a][layer][kept], of[b][layer][kept]))
        values[first, second] = values[second, first] = np.mean(each)
    return values


class Contrast(NamedTuple):
    """Mean similarity within kinds and between them, and how often chance makes the difference as large."""

    same: float
    different: float
    p: float


def same_kind(similarity: np.ndarray, kinds: Sequence[str]) -> Contrast:
    """Whether tasks of one kind are more alike: a permutation test over who is of which kind (one-sided).

    All orders of up to 7 tasks, above that 10,000 random ones. Raises `InputError` where no two tasks are of
    one kind, or all are.
    """
    names = np.asarray(kinds)
    upper = np.triu(np.ones(similarity.shape, bool), 1)
    values = (similarity + similarity.T)[upper] / 2

    def difference(order: Sequence[int]) -> tuple[float, float, float]:
        same = (names[list(order)][:, None] == names[list(order)])[upper]
        return values[same].mean() - values[~same].mean(), values[same].mean(), values[~same].mean()

    count = len(names)
    pairs = (names[:, None] == names)[upper]
    if similarity.shape != (count, count) or pairs.all() or not pairs.any():
        raise InputError(f"kinds {list(kinds)}: pairs of one kind and of two are needed, one kind a task")
    observed, same, different = difference(range(count))
    found = [difference(order)[0] for order in _orders(count)]
    return Contrast(same, different, float(np.mean(np.asarray(found) >= observed - 1e-12)))


class Agreement(NamedTuple):
    """Rank correlation of two matrices' entries off the diagonal, and its permutation p-value (one-sided).

    `low` to `high` is its interval over resampled tasks.
    """

    correlation: float
    p: float
    low: float
    high: float


def agreement(similarity: np.ndarray, transfer: np.ndarray, level: float = 0.95) -> Agreement:
    """Whether pairs that are more alike transfer better: Mantel's test (1967), tasks permuted together.

    The interval is the percentile bootstrap over tasks, not pairs, which share tasks; a task that is drawn
    twice is no pair with itself. Raises `InputError` for fewer than three tasks.
    """
    if len(similarity) < 3:
        raise InputError(f"agreement over {len(similarity)} tasks; three or more have pairs to rank")
    off = ~np.eye(len(similarity), dtype=bool)

    def correlation(order: Sequence[int]) -> float:
        return spearman(similarity[np.ix_(order, order)][off], transfer[off])

    observed = correlation(range(len(similarity)))
    found = [correlation(order) for order in _orders(len(similarity))]
    p = float(np.mean(np.asarray(found) >= observed - 1e-12))
    return Agreement(observed, p, *_interval(similarity, transfer, level))


def _interval(one: np.ndarray, two: np.ndarray, level: float, draws: int = 1000) -> tuple[float, float]:
    numbers = np.random.default_rng(0)
    found = []
    for drawn in numbers.integers(0, len(one), (draws, len(one))):
        if len(set(drawn.tolist())) > 2:  # of two tasks there are two pairs, whose ranks say nothing
            apart = drawn[:, None] != drawn
            found.append(spearman(one[np.ix_(drawn, drawn)][apart], two[np.ix_(drawn, drawn)][apart]))
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _orders(count: int) -> list[tuple[int, ...]]:
    if count <= 7:
        return list(itertools.permutations(range(count)))
    numbers = np.random.default_rng(0)
    drawn = [tuple(int(each) for each in numbers.permutation(count)) for _ in range(10_000)]
    return [tuple(range(count)), *drawn]
