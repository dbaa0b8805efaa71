"""From predictivities to skill neurons: the top few of each layer, and random ones to compare them with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ... import InputError


def over_trials(trials: Sequence[np.ndarray], by: str = "mean") -> np.ndarray:
    """Predictivities `[S, L, F]` of several prompts or seeds as one: their mean, or the least of them."""
    if by not in ("mean", "min"):
        raise InputError(f"predictivities of trials are joined by 'mean' or 'min', not {by!r}")
    if not trials:
        raise InputError("no trials to join; give the predictivities of at least one")
    joined = np.stack(trials)
    return joined.mean(0) if by == "mean" else joined.min(0)


def select(predictivity: np.ndarray, fraction: float) -> np.ndarray:
    """The skill neurons as a mask `[L, F]`: in every layer round(fraction F), at least one.

    Of S subtasks `[S, L, F]` each names its best neuron in turn until a layer has as many as it may: so all
    have an equal share, and a neuron that serves several is counted once. Per layer, not over all layers,
    because later layers are more predictive as a whole.
    """
    if not 0 < fraction <= 1:
        raise InputError(f"a fraction of {fraction} of the neurons; it must be above 0 and at most 1")
    layers, width = predictivity.shape[1:]
    count = max(1, round(fraction * width))
    mask = np.zeros((layers, width), bool)
    order = np.argsort(-predictivity, axis=-1, kind="stable")  # [S, L, F]
    for layer in range(layers):
        in_turn = order[:, layer].T.reshape(-1)  # rank 0 of every subtask, then rank 1, ...
        distinct = in_turn[np.sort(np.unique(in_turn, return_index=True)[1])]
        mask[layer, distinct[:count]] = True
    return mask


def random_like(mask: np.ndarray, seed: int) -> np.ndarray:
    """As many neurons in each layer, drawn from all of the layer's: the control of `mask [L, F]`."""
    draw = np.random.default_rng(seed)
    drawn = np.zeros_like(mask)
    for row, chosen in zip(drawn, mask):
        row[draw.permutation(len(row))[: chosen.sum()]] = True
    return drawn


def in_layers(mask: np.ndarray, layers: range) -> np.ndarray:
    """`mask [L, F]` with nothing chosen outside of `layers`."""
    kept = np.zeros_like(mask)
    kept[list(layers)] = mask[list(layers)]
    return kept
