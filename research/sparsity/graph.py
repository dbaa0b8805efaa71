"""Cutting a weighted graph into parts of one size: METIS where it is installed, else our own."""

from __future__ import annotations

import importlib.util
import logging

import numpy as np
from scipy.linalg import eigh

from ... import InputError
from .balanced import assign_balanced, balanced_kmeans

logger = logging.getLogger(__name__)

ROUNDS = 10
LEVELS = 1000  # METIS wants whole numbers: the largest weight becomes this


def partition_graph(weights: np.ndarray, parts: int, seed: int = 0, method: str = "auto") -> np.ndarray:
    """Labels `[F]` of nodes in `parts` of F / `parts` nodes each, few of the `weights [F, F]` cut.

    `method` "metis" is multilevel recursive bisection by `pymetis` with its sizes made equal afterwards,
    "spectral" k-means on the leading eigenvectors of the normalised weights (Ng, Jordan and Weiss, 2002);
    both are refined by swaps (Kernighan and Lin, 1970). "auto" is METIS where it is installed; the log says
    which.
    """
    nodes = len(weights)
    if nodes % parts:
        raise InputError(f"{nodes} nodes do not divide into {parts} parts")
    if method == "auto":
        method = "metis" if importlib.util.find_spec("pymetis") else "spectral"
        logger.info("graph of %d nodes into %d parts: %s", nodes, parts, method)
    if method not in ("metis", "spectral"):
        raise InputError(f"graph partition {method!r} is unknown; valid: auto, metis, spectral")
    weights = np.array(weights, np.float32)
    np.fill_diagonal(weights, 0.0)
    labels = _by_metis(weights, parts) if method == "metis" else _by_eigenvectors(weights, parts, seed)
    return refine(weights, labels, parts)


def cut(weights: np.ndarray, labels: np.ndarray) -> float:
    """The weight between different parts over all of it; a random partition's is about 1 - 1 / parts."""
    other = labels[:, None] != labels[None]
    np.fill_diagonal(other, False)
    total = float(weights.sum() - np.trace(weights))
    return float(weights[other].sum() / total) if total else 0.0


def refine(weights: np.ndarray, labels: np.ndarray, parts: int) -> np.ndarray:
    """Swap pairs of nodes while that lowers the cut; sizes stay."""
    labels = labels.copy()
    inside = weights @ np.eye(parts, dtype=np.float32)[labels]  # [F, parts]: to each part
    everyone = np.arange(len(labels))
    for _ in range(ROUNDS):
        gains = inside - inside[everyone, labels][:, None]
        wanting = np.argsort(-gains.max(1), kind="stable")
        swaps = sum(_swap(weights, labels, inside, int(node)) for node in wanting[gains.max(1)[wanting] > 0])
        if not swaps:
            break
    return labels


def _swap(weights: np.ndarray, labels: np.ndarray, inside: np.ndarray, node: int) -> bool:
    """Swap `node` with the best partner in the part that it is tied to most, if both gain together."""
    own = labels[node]
    part = int(np.argmax(inside[node]))
    if part == own:
        return False
    others = np.flatnonzero(labels == part)
    gain = inside[node, part] - inside[node, own] + inside[others, own] - inside[others, part]
    gain = gain - 2 * weights[node, others]
    best = int(np.argmax(gain))
    if gain[best] <= 1e-6 * max(float(inside[node].sum()), 1e-30):
        return False
    other = others[best]
    move = weights[:, node] - weights[:, other]
    inside[:, own] -= move
    inside[:, part] += move
    labels[node], labels[other] = part, own
    return True


def _by_eigenvectors(weights: np.ndarray, parts: int, seed: int) -> np.ndarray:
    degree = weights.sum(1)
    scale = 1 / np.sqrt(np.maximum(degree, 1e-12 * max(float(degree.max()), 1e-30)))
    normalised = (scale[:, None] * weights * scale).astype(np.float64)
    nodes = len(weights)
    _, vectors = eigh(normalised, subset_by_index=(nodes - min(parts, nodes), nodes - 1))
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return balanced_kmeans((vectors / np.maximum(lengths, 1e-12)).astype(np.float32), parts, seed)


def _by_metis(weights: np.ndarray, parts: int) -> np.ndarray:
    import pymetis

    whole = np.rint(weights * (LEVELS / max(float(weights.max()), 1e-30))).astype(int)
    near = [np.flatnonzero(row) for row in whole]
    starts = np.concatenate([[0], np.cumsum([len(each) for each in near])])
    _, found = pymetis.part_graph(
        parts,
        adjacency=pymetis.CSRAdjacency(starts.tolist(), np.concatenate(near).tolist()),
        eweights=np.concatenate([row[each] for row, each in zip(whole, near)]).tolist(),
    )
    return _evened(weights, np.asarray(found), parts)


def _evened(weights: np.ndarray, labels: np.ndarray, parts: int) -> np.ndarray:
    """Parts of one size from parts of about one size: those leave full parts who lose least."""
    member = np.eye(parts, dtype=np.float32)[labels]
    inside = weights @ member
    stay = inside.sum(1, keepdims=True) * member
    return assign_balanced(-(inside + stay), len(labels) // parts)
