"""How much of what neurons do a choice of experts keeps."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ...models.kernels.sparse import Experts
from ...models.model import Params
from ...models.precision import FP32
from ...models.selection import Selection, expert_mass


class Captured(NamedTuple):
    """Means over tokens, each in [0, 1]; `mass` and `best` are shares of the tokens' activation mass.

    `mass` is what the chosen experts hold, `best` what the k most massive ones hold, `recall` the share of
    these that was chosen.
    """

    mass: float
    best: float
    recall: float


def captured(
    selection: Selection, params: Params, experts: Experts, inputs: np.ndarray, chosen: int
) -> Captured:
    """Of `chosen` experts a token on `inputs [N, D]`; tokens without any active neuron do not count."""
    found = _captured(selection, dict(params), experts, jnp.asarray(inputs), chosen)
    return Captured(*(float(each) for each in found))


@partial(jax.jit, static_argnames=("selection", "chosen"))
def _captured(
    selection: Selection, params: Params, experts: Experts, inputs: jax.Array, chosen: int
) -> tuple[jax.Array, ...]:
    mass = expert_mass(experts, inputs)
    module = selection.build(experts.count, FP32)
    scores: Any = module.apply({"params": params}, inputs, experts)
    picked = lax.top_k(scores, chosen)[1]
    best, wanted = lax.top_k(mass, chosen)
    total = mass.sum(-1)
    active = total > 0
    count = jnp.maximum(active.sum(), 1)
    held = jnp.take_along_axis(mass, picked, axis=-1).sum(-1)
    shares = [jnp.where(active, part / jnp.where(active, total, 1.0), 0.0) for part in (held, best.sum(-1))]
    hits = (picked[:, :, None] == wanted[:, None]).any(-1).mean(-1)
    return *(share.sum() / count for share in shares), jnp.where(active, hits, 0.0).sum() / count
