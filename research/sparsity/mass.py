"""How activation mass is spread over neurons: for models whose neurons are small but never silent.

For each token and layer, neurons in order of their sizes |a|: which share of the sum of sizes the largest x%
hold, how many neurons hold 90% of it, and the effective number of neurons, exp of the entropy of the shares
(all neurons alike: F; one alone: 1). Nothing `[B, T, F]` is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ... import InputError
from ...models.hooks import run_with_cache
from ...models.model import Model
from .layers import unstacked
from .statistics import Batch, real_tokens, transformer_inputs

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
HELD = 0.9
Sums = dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True, eq=False)
class LayerMass:
    """Means over the `tokens` of a layer that have any mass.

    `held [len(SHARES)]` is the share of the mass in the largest SHARES of F neurons, `needed` the fraction of
    neurons that holds HELD of it, `effective` the effective number of neurons.
    """

    name: str
    width: int
    tokens: int
    held: np.ndarray
    needed: float
    effective: float

    def merge(self, other: LayerMass) -> LayerMass:
        """The means over both sets of tokens."""
        tokens = self.tokens + other.tokens
        part = self.tokens / tokens
        held, needed, effective = (
            part * getattr(self, name) + (1 - part) * getattr(other, name)
            for name in ("held", "needed", "effective")
        )
        return LayerMass(self.name, self.width, tokens, held, needed, effective)


def measure_mass(
    model: Model | nn.Module,
    params: Mapping[str, Any],
    batches: Iterable[Batch],
    *,
    names: str | Sequence[str] = "mlp/act",
) -> tuple[LayerMass, ...]:
    """The mass statistics of the sites that `names` match, over all real tokens of `batches`.

    Raises `InputError` for names that match nothing and where no token has any mass.
    """
    patterns = [names] if isinstance(names, str) else list(names)

    @jax.jit
    def count(params: Mapping[str, Any], batch: Batch) -> dict[str, dict[str, jax.Array]]:
        args, kwargs = transformer_inputs(batch)
        sums = partial(mass_sums, batch)
        return run_with_cache(model, params, *args, names=patterns, reduce=sums, **kwargs)[1]

    total: Sums = {}
    for batch in batches:
        total = added(total, jax.device_get(count(params, dict(batch))))
    return mass_of(total)


def added(total: Sums, found: Mapping[str, Mapping[str, np.ndarray]]) -> Sums:
    """`total`, which may be empty, with the `mass_sums` of a further batch, by layer."""
    wide = {name: jax.tree.map(np.float64, one) for name, one in unstacked(found)}
    return {
        name: {key: one[key] + total[name][key] for key in one} if name in total else one
        for name, one in wide.items()
    }


def mass_of(total: Sums) -> tuple[LayerMass, ...]:
    """The means that sums over batches give; raises `InputError` where no token has any mass."""
    if not total:
        raise InputError("no batches to measure activations on")
    if silent := [name for name, one in total.items() if int(one["tokens"]) == 0]:
        raise InputError(f"{', '.join(silent)}: no token of any batch has an activation that is not 0")
    return tuple(_layer(name, one) for name, one in total.items())


def mass_rows(layers: Sequence[LayerMass]) -> list[dict[str, Any]]:
    """A table, one row a layer."""
    return [
        {
            "layer": layer.name,
            **{f"mass in top {share:.0%}": float(held) for share, held in zip(SHARES, layer.held)},
            f"neurons for {HELD:.0%}": layer.needed,
            "effective neurons": layer.effective,
            "effective share": layer.effective / layer.width,
        }
        for layer in layers
    ]


def mass_sums(batch: Batch, path: str, value: jax.Array) -> dict[str, jax.Array]:
    """What is kept of a batch's activations `[..., F]` at a site: sums over its real tokens."""
    width = value.shape[-1]
    real = jnp.broadcast_to(real_tokens(batch, path), value.shape[:-1]).reshape(-1)
    sizes = jnp.abs(value.astype(jnp.float32)).reshape(-1, width)
    mass = sizes.sum(-1)
    counted = real & (mass > 0)
    shares = -jnp.sort(-sizes, axis=-1) / jnp.where(counted, mass, 1.0)[:, None]
    running = jnp.cumsum(shares, axis=-1)
    places = np.maximum(np.rint(np.asarray(SHARES) * width).astype(int), 1) - 1
    entropy = -(shares * jnp.log(jnp.where(shares > 0, shares, 1.0))).sum(-1)

    def total(each: jax.Array) -> jax.Array:
        return jnp.where(counted.reshape(-1, *[1] * (each.ndim - 1)), each, 0).astype(jnp.float32).sum(0)

    return {
        "tokens": counted.sum(dtype=jnp.int32),
        "width": jnp.full((), width, jnp.int32),
        "held": total(running[:, places]),
        "needed": total((running < HELD).sum(-1) + 1),
        "effective": total(jnp.exp(entropy)),
        "batches": jnp.ones((), jnp.int32),
    }


def _layer(name: str, sums: dict[str, np.ndarray]) -> LayerMass:
    tokens, width = int(sums["tokens"]), round(float(sums["width"] / sums["batches"]))
    held = sums["held"] / tokens
    needed = min(float(sums["needed"]) / tokens / width, 1.0)
    return LayerMass(name, width, tokens, held, needed, float(sums["effective"]) / tokens)
