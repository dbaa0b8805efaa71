"""Which feed-forward neurons fire, how often and on how many inputs, streamed in one pass.

For every layer: how often each neuron is active (its activation exceeds a threshold, 0 as in Zhang et al.,
"MoEfication", 2022, and Li et al., "The Lazy Neuron Phenomenon", 2023) over the tokens that are not
padding, and how many tokens have 0, 1, ..., F active neurons, from which the cumulative distribution of
the active ratio follows exactly; where asked for, on how many tokens each two neurons are active together.
Activations `[B, T, F]` are reduced inside the compiled program and never
kept; counts are added up on the host in 64 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ... import InputError
from ...models.hooks import run_with_cache
from ...models.model import Model
from .layers import unstacked

Batch = Mapping[str, Any]
Inputs = Callable[[Batch], tuple[tuple, dict[str, Any]]]
Real = Callable[[Batch, str], Any]

INPUT_KEYS = ("segments", "positions", "decoder_tokens", "decoder_segments")


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Counts of one layer with F neurons over `tokens` tokens.

    `active [F]` counts the tokens on which a neuron was active, `histogram [F + 1]` the tokens that had
    0, 1, ..., F active neurons, `nonzero` the activations that were not exactly zero, `total [F]` is the
    sum of activations. `together [F, F]` counts the tokens on which two neurons were both active, where that
    was asked for.
    """

    name: str
    tokens: int
    active: np.ndarray
    nonzero: int
    total: np.ndarray
    histogram: np.ndarray
    together: np.ndarray | None = None

    @property
    def width(self) -> int:
        """F, the number of neurons."""
        return len(self.active)

    @property
    def frequency(self) -> np.ndarray:
        """The fraction of tokens on which each neuron is active, `[F]`."""
        return self.active / self.tokens

    @property
    def mean(self) -> np.ndarray:
        """The mean activation of each neuron, `[F]`."""
        return self.total / self.tokens

    @property
    def active_ratio(self) -> float:
        """The fraction of neurons that is active on a token, in the mean."""
        return float(self.active.sum() / (self.tokens * self.width))

    @property
    def nonzero_ratio(self) -> float:
        """The fraction of activations that is not exactly zero."""
        return self.nonzero / (self.tokens * self.width)

    @property
    def dead(self) -> np.ndarray:
        """Indices of the neurons that no token activates."""
        return np.flatnonzero(self.active == 0)

    @property
    def always_on(self) -> np.ndarray:
        """Indices of the neurons that every token activates."""
        return np.flatnonzero(self.active == self.tokens)

    @property
    def ever_active(self) -> float:
        """The fraction of neurons that some token activates."""
        return 1.0 - len(self.dead) / self.width

    @cached_property
    def ratios(self) -> np.ndarray:
        """The possible ratios of active neurons, 0, 1/F, ..., 1."""
        return np.arange(self.width + 1) / self.width

    @property
    def cumulative(self) -> np.ndarray:
        """The fraction of tokens whose ratio of active neurons is at most `ratios`, `[F + 1]`."""
        return np.cumsum(self.histogram) / self.tokens

    def fraction_of_inputs_below(self, ratio: float) -> float:
        """The fraction of tokens that activate less than this fraction of the neurons."""
        return float(self.histogram[self.ratios < ratio].sum() / self.tokens)

    def merge(self, other: LayerStatistics) -> LayerStatistics:
        """The statistics over both sets of tokens."""
        if (self.together is None) != (other.together is None):
            raise InputError(f"statistics of {self.name} with and without co-activation do not add")
        if (self.name, self.width) != (other.name, other.width):
            raise InputError(
                f"statistics of {self.name} with {self.width} neurons and of {other.name} with {other.width} "
                f"do not add"
            )
        return LayerStatistics(
            self.name,
            self.tokens + other.tokens,
            self.active + other.active,
            self.nonzero + other.nonzero,
            self.total + other.total,
            self.histogram + other.histogram,
            None if self.together is None or other.together is None else self.together + other.together,
        )


@dataclass(frozen=True)
class ActivationStatistics:
    """The statistics of several layers, by name and number.

    A neuron is active where its activation, with `sizes` the size of it, is above `threshold`.
    """

    layers: tuple[LayerStatistics, ...]
    threshold: float = 0.0
    sizes: bool = False

    def __getitem__(self, name: str) -> LayerStatistics:
        """The layer called `name`, such as `layers_3/mlp/act`."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise InputError(
            f"no statistics of {name!r}; there are {', '.join(each.name for each in self.layers)}"
        )

    @property
    def active_ratio(self) -> float:
        """The mean active ratio over layers and tokens, each neuron counted alike."""
        return self._over_neurons([layer.active_ratio for layer in self.layers])

    @property
    def nonzero_ratio(self) -> float:
        """The fraction of all activations that is not exactly zero."""
        return self._over_neurons([layer.nonzero_ratio for layer in self.layers])

    @property
    def ever_active(self) -> float:
        """The fraction of all neurons that some token activates."""
        return 1.0 - self.dead / sum(layer.width for layer in self.layers)

    @property
    def dead(self) -> int:
        """How many neurons no token activates."""
        return sum(len(layer.dead) for layer in self.layers)

    def fraction_of_inputs_below(self, ratio: float) -> float:
        """The fraction of (token, layer) pairs in which less than this fraction of the neurons is active."""
        parts = [layer.fraction_of_inputs_below(ratio) * layer.tokens for layer in self.layers]
        return sum(parts) / sum(layer.tokens for layer in self.layers)

    def cumulative(self, ratios: np.ndarray) -> np.ndarray:
        """The fraction of (token, layer) pairs whose active ratio is at most each of `ratios`."""
        steps = [np.searchsorted(layer.ratios, ratios, side="right") for layer in self.layers]
        counts = [
            np.concatenate([[0], np.cumsum(layer.histogram)])[step] for layer, step in zip(self.layers, steps)
        ]
        return np.sum(counts, axis=0) / sum(layer.tokens for layer in self.layers)

    def merge(self, other: ActivationStatistics) -> ActivationStatistics:
        """The statistics over both sets of tokens; both must have counted the same."""
        if self.sizes != other.sizes:
            raise InputError("statistics of activations and of their sizes do not add")
        if self.threshold != other.threshold or len(self.layers) != len(other.layers):
            raise InputError(
                f"statistics of {len(self.layers)} layers at threshold {self.threshold} and of "
                f"{len(other.layers)} at {other.threshold} do not add"
            )
        return replace(self, layers=tuple(a.merge(b) for a, b in zip(self.layers, other.layers)))

    def rows(self, ratio: float = 0.05) -> list[dict[str, Any]]:
        """A table, one row per layer: ratios, dead neurons, tokens that activate less than `ratio`."""
        return [
            {
                "layer": layer.name,
                "neurons": layer.width,
                "tokens": layer.tokens,
                "active": layer.active_ratio,
                "nonzero": layer.nonzero_ratio,
                f"inputs below {ratio:.0%}": layer.fraction_of_inputs_below(ratio),
                "dead": len(layer.dead),
                "always on": len(layer.always_on),
                "ever active": layer.ever_active,
            }
            for layer in self.layers
        ]

    def _over_neurons(self, ratios: Sequence[float]) -> float:
        return float(np.average(ratios, weights=[layer.width * layer.tokens for layer in self.layers]))


@dataclass(frozen=True)
class Counter:
    """What is counted; called, it counts a batch in a compiled program. See `measure` for the fields."""

    model: Model | nn.Module
    names: tuple[str, ...] = ("mlp/act",)
    threshold: float = 0.0
    sizes: bool = False
    together: bool = False
    inputs: Inputs | None = None
    real: Real | None = None

    @cached_property
    def count(self) -> Callable[[Mapping[str, Any], Batch], dict[str, dict[str, jax.Array]]]:
        """The program, one for each shape of batches, whatever the parameters."""

        @jax.jit
        def count(params: Mapping[str, Any], batch: Batch) -> dict[str, dict[str, jax.Array]]:
            reduce = partial(self.reduced, batch)
            args, kwargs = (self.inputs or transformer_inputs)(batch)
            return run_with_cache(self.model, params, *args, names=self.names, reduce=reduce, **kwargs)[1]

        return count

    def measure(self, params: Mapping[str, Any], batches: Iterable[Batch]) -> ActivationStatistics:
        """The statistics over all of `batches`, as `measure` returns them."""
        total: ActivationStatistics | None = None
        for batch in batches:
            total = self.added(total, jax.device_get(self.count(params, dict(batch))))
        return counted(total)

    def reduced(self, batch: Batch, path: str, value: jax.Array) -> dict[str, jax.Array]:
        """What is kept of a batch's activations `[..., F]` at a site."""
        return self._reduced(value, (self.real or real_tokens)(batch, path))

    def added(
        self, total: ActivationStatistics | None, counts: dict[str, dict[str, np.ndarray]]
    ) -> ActivationStatistics:
        """`total`, if there is any yet, with what was kept of a further batch."""
        seen = ActivationStatistics(_layers(counts), self.threshold, self.sizes)
        return seen if total is None else total.merge(seen)

    def _reduced(self, value: jax.Array, real: jax.Array) -> dict[str, jax.Array]:
        """What is kept of activations `[..., F]`; sums are per neuron, so that 32 bits hold a batch's."""
        width = value.shape[-1]
        real = jnp.broadcast_to(real, value.shape[:-1]).reshape(-1)
        value = value.reshape(-1, width).astype(jnp.float32)
        active = ((jnp.abs(value) if self.sizes else value) > self.threshold) & real[:, None]
        per_token = jnp.where(real, active.sum(-1), width + 1)  # one bin too far: dropped
        found = {
            "tokens": real.sum(dtype=jnp.int32),
            "active": active.sum(0, dtype=jnp.int32),
            "nonzero": ((value != 0) & real[:, None]).sum(0, dtype=jnp.int32),
            "total": jnp.where(real[:, None], value, 0.0).sum(0),
            "histogram": jnp.zeros(width + 1, jnp.int32).at[per_token].add(1, mode="drop"),
        }
        return found | ({"together": _together(active)} if self.together else {})


def measure(
    model: Model | nn.Module,
    params: Mapping[str, Any],
    batches: Iterable[Batch],
    *,
    names: str | Sequence[str] = "mlp/act",
    threshold: float = 0.0,
    sizes: bool = False,
    together: bool = False,
    inputs: Inputs | None = None,
    real: Real | None = None,
) -> ActivationStatistics:
    """Activation statistics of the sites that `names` match (see `models.hooks`), over all of `batches`.

    A neuron is active where its activation is above `threshold`; with `sizes` where its absolute value is, as
    for activation functions and products that are negative too. `together` counts pairs of neurons as well,
    `[F, F]` a layer. `inputs(batch)` gives the model's arguments; by default `tokens` and, where the batch
    has them, `segments`, `positions`, `decoder_tokens` and `decoder_segments`. `real(batch, path)` says which
    tokens count, broadcast to a site's leading axes; by default those with a segment number above 0, in
    rows whose `weight` is not 0. Batches of one shape share one compiled program; parameters and batches may
    lie on a mesh. To measure several parameter trees of a model keep a `Counter`.

    Raises `InputError` for names that match nothing, for no batches, no real tokens, and for activations
    that are not finite.
    """
    patterns = (names,) if isinstance(names, str) else tuple(names)
    counter = Counter(model, patterns, threshold, sizes, together, inputs, real)
    return counter.measure(params, batches)


def counted(total: ActivationStatistics | None) -> ActivationStatistics:
    """`total`; raises `InputError` where nothing was counted, or what is not finite."""
    if total is None:
        raise InputError("no batches to measure activations on")
    for layer in total.layers:
        _require_counted(layer)
    return total


def _require_counted(layer: LayerStatistics) -> None:
    if layer.tokens == 0:
        raise InputError(f"{layer.name}: no token of any batch counts; are all segments 0 (padding)?")
    if not np.isfinite(layer.total).all():
        raise InputError(
            f"{layer.name}: activations are not finite in {(~np.isfinite(layer.total)).sum()} neurons"
        )


def _together(active: jax.Array) -> jax.Array:
    """`[F, F]`: on how many tokens two neurons are both active; float32 is exact up to 2²⁴ tokens a batch."""
    ones = active.astype(jnp.float32)
    return jnp.matmul(ones.T, ones, precision="highest").astype(jnp.int32)


def transformer_inputs(batch: Batch) -> tuple[tuple, dict[str, Any]]:
    """The arguments of our `Transformer` that a batch has."""
    if "tokens" not in batch:
        raise InputError(f"a batch needs 'tokens', this one has {', '.join(sorted(batch))}; or pass inputs=")
    return (batch["tokens"],), {key: batch[key] for key in INPUT_KEYS if key in batch}


def real_tokens(batch: Batch, path: str) -> jax.Array:
    """Which tokens are neither padding nor in a row that only fills the batch, `[B, T]`."""
    side = "decoder_" if "decoder_tokens" in batch and "decoder" in path.split("/") else ""
    segments = batch.get(f"{side}segments")
    found = jnp.ones(jnp.shape(batch[f"{side}tokens"]), bool) if segments is None else segments > 0
    return found & (batch["weight"] > 0)[:, None] if "weight" in batch else found


def _layers(counts: dict[str, dict[str, np.ndarray]]) -> tuple[LayerStatistics, ...]:
    return tuple(
        LayerStatistics(
            name,
            int(one["tokens"]),
            one["active"].astype(np.int64),
            int(one["nonzero"].sum(dtype=np.int64)),
            one["total"].astype(np.float64),
            one["histogram"].astype(np.int64),
            one["together"].astype(np.int64) if "together" in one else None,
        )
        for name, one in unstacked(counts)
    )
