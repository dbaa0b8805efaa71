"""Which neurons tell things apart as an attribute of these things does.

Representational similarity analysis (Kriegeskorte et al., 2008), neuron by neuron: N things (emotions, tasks)
have an activation and a rating each; a neuron is about the attribute where things that differ in the rating
differ in activation and others do not. Neurons that are ranked so are masked, and what that costs is compared
with random masks (Li et al., arXiv 2302.09582, with ratings of people; here any number a thing will do).
"""

from __future__ import annotations

import numpy as np

from ... import InputError


def attribute_scores(states: np.ndarray, ratings: np.ndarray) -> np.ndarray:
    """Pearson's r `[L, F]` over pairs of things between |difference of activations| and |of ratings|.

    `states [N, L, F]`, `ratings [N]`; things without a rating (nan) are left out. A neuron that is the same
    for all things has 0. Raises `InputError` for fewer than four rated things, or ratings that are all one.
    """
    if len(states) != len(ratings) or states.ndim != 3:
        raise InputError(
            f"states {states.shape} must be [N, L, F] with as many things as ratings {len(ratings)}"
        )
    rated = ~np.isnan(ratings)
    different = len(set(ratings[rated].tolist()))
    if rated.sum() < 4 or different < 2:
        raise InputError(
            f"{rated.sum()} rated things with {different} different ratings; at least four things and two "
            f"ratings say what a neuron is about"
        )
    one, two = np.triu_indices(int(rated.sum()), 1)
    wanted = np.abs(ratings[rated][one] - ratings[rated][two])
    wanted = wanted - wanted.mean()
    layers = states[rated].swapaxes(0, 1)
    return np.stack([_correlations(np.abs(layer[one] - layer[two]), wanted) for layer in layers])


def membership(groups: np.ndarray, group: str) -> np.ndarray:
    """The rating `[N]` "is it of this group": 1 or 0."""
    if group not in groups:
        raise InputError(f"no thing is in group {group!r}; the groups are {', '.join(sorted(set(groups)))}")
    return (np.asarray(groups) == group).astype(np.float64)


def _correlations(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """r of each column of `found [pairs, F]` with the centred `wanted [pairs]`."""
    centred = found - found.mean(0)
    size = np.linalg.norm(centred, axis=0) * np.linalg.norm(wanted)
    return np.divide(wanted @ centred, size, out=np.zeros(found.shape[1]), where=size > 1e-12)
