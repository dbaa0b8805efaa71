"""Which neurons fire and how mass is spread over them, in one pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax

from ...models.hooks import run_with_cache
from .mass import LayerMass, Sums, added, mass_of, mass_sums
from .statistics import ActivationStatistics, Batch, Counter, counted, transformer_inputs

COUNTS, MASS = "counts", "mass"


class Surveyed(NamedTuple):
    """What a survey finds: counts by layer, and mass by layer."""

    active: ActivationStatistics
    mass: tuple[LayerMass, ...]

    def merge(self, other: Surveyed) -> Surveyed:
        """Over both sets of tokens."""
        mass = tuple(one.merge(two) for one, two in zip(self.mass, other.mass, strict=True))
        return Surveyed(self.active.merge(other.active), mass)


@dataclass(frozen=True)
class Survey:
    """What `counter` counts and the mass at the same sites; every batch goes through the model once."""

    counter: Counter

    @cached_property
    def count(self) -> Callable[[Mapping[str, Any], Batch], dict[str, dict[str, dict[str, jax.Array]]]]:
        """The program, one for each shape of batches, whatever the parameters."""
        counter = self.counter

        @jax.jit
        def count(params: Mapping[str, Any], batch: Batch) -> dict[str, dict[str, dict[str, jax.Array]]]:
            def reduce(path: str, value: jax.Array) -> dict[str, dict[str, jax.Array]]:
                return {COUNTS: counter.reduced(batch, path, value), MASS: mass_sums(batch, path, value)}

            args, kwargs = (counter.inputs or transformer_inputs)(batch)
            found = run_with_cache(
                counter.model, params, *args, names=counter.names, reduce=reduce, **kwargs
            )[1]
            return {kind: {path: one[kind] for path, one in found.items()} for kind in (COUNTS, MASS)}

        return count

    def measure(self, params: Mapping[str, Any], batches: Iterable[Batch]) -> Surveyed:
        """Over all of `batches`; raises what `measure` and `measure_mass` raise."""
        active: ActivationStatistics | None = None
        mass: Sums = {}
        for batch in batches:
            found = jax.device_get(self.count(params, dict(batch)))
            active, mass = self.counter.added(active, found[COUNTS]), added(mass, found[MASS])
        return Surveyed(counted(active), mass_of(mass))
