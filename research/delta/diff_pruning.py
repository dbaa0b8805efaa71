"""Diff pruning: a sparse difference to the backbone (Guo et al., 2021, arXiv 2012.07463)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ... import InputError
from .attach import Entry, Tuned
from .methods import LeafMethod, Variables
from .offsets import offset_dtype
from .random_subset import SparseOffset
from .trees import Place, from_places, places, require_variables

# Gates are stretched from (0, 1) to this interval and clipped, so that both 0 and 1 have a probability
# (Guo et al., section 3.1, after Louizos et al., 2018, arXiv 1712.01312).
LOW, HIGH = -1.5, 1.5


@dataclass(frozen=True)
class DiffPruning(LeafMethod):
    """`leaf + z * w` with hard-concrete gates `z` in [0, 1], one per number; both are trained.

    In training `z = clip(s (r - l) + l)` with `s = sigmoid(log u - log(1 - u) + log_alpha)`, `u` uniform,
    (l, r) = (-1.5, 1.5); without a key the gate is the one of `u = 1/2` (Louizos et al., equation 13). The
    loss gains `sparsity` times the expected number of open gates. With `group`, each array has one more
    gate that multiplies all of its own ("structured"); a stack of scanned layers is one array.

    `w` starts at zero, so the model starts exactly where it was; `log_alpha` at `start`. 1.25e-7 and 5 are
    the values in the authors' code, read in copies of it. `project` then keeps the largest differences and
    stores them alone; until then a delta is twice as large as its arrays. Default position: the whole model.
    """

    sparsity: float = 1.25e-7
    start: float = 5.0
    group: bool = False

    name: ClassVar[str] = "diff_pruning"
    positions: ClassVar[tuple[str, ...]] = ("",)
    alike: ClassVar[tuple[str, ...]] = ("offset", "log_alpha")

    def __post_init__(self) -> None:
        if self.sparsity < 0:
            raise InputError(f"diff pruning sparsity={self.sparsity} must be at least 0")

    @property
    def random(self) -> bool:
        """Gates are drawn."""
        return True

    def init(self, rng: jax.Array, leaf: jax.Array) -> Variables:
        """A difference of zeros, and open gates."""
        dtype = offset_dtype(leaf)
        made = {"offset": jnp.zeros(leaf.shape, dtype), "log_alpha": jnp.full(leaf.shape, self.start, dtype)}
        return {**made, "group_log_alpha": jnp.full((), self.start, dtype)} if self.group else made

    def apply(self, variables: Variables, leaf: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """The gated sum, rounded to the array's own dtype."""
        return (leaf + self.difference(variables, rng)).astype(leaf.dtype)

    def difference(self, variables: Variables, rng: jax.Array | None = None) -> jax.Array:
        """`z * w`, the gates drawn with `rng`, or those of evaluation without."""
        own, whole = (None, None) if rng is None else jax.random.split(rng)
        gate = hard_concrete(variables["log_alpha"], own)
        if self.group:
            gate = gate * hard_concrete(variables["group_log_alpha"], whole)
        return gate * variables["offset"]

    def unmerge(self, variables: Variables, leaf: jax.Array, path: str) -> jax.Array:
        """The array without its difference."""
        return (leaf - self.difference(variables)).astype(leaf.dtype)

    def scaled(self, variables: Variables, factor: Any) -> Variables:
        """The difference times `factor`, the gates as they are."""
        return {**variables, "offset": variables["offset"] * factor}

    def penalty(self, variables: Variables) -> Any:
        """`sparsity` times the expected number of non-zero differences, as if no `w` were zero."""
        expected = open_probability(variables["log_alpha"]).sum()
        if self.group:
            expected = expected * open_probability(variables["group_log_alpha"])
        return self.sparsity * expected


def hard_concrete(log_alpha: jax.Array, rng: jax.Array | None = None) -> jax.Array:
    """Gates in [0, 1] of `log_alpha`'s shape: drawn with `rng`, those of evaluation without."""
    if rng is not None:
        # Clipped as in the authors' code: the noise stays finite.
        u = jax.random.uniform(rng, log_alpha.shape, log_alpha.dtype, 1e-4, 1 - 1e-4)
        log_alpha = log_alpha + jnp.log(u) - jnp.log1p(-u)
    return jnp.clip(jax.nn.sigmoid(log_alpha) * (HIGH - LOW) + LOW, 0.0, 1.0)


def open_probability(log_alpha: jax.Array) -> jax.Array:
    """The probability that a drawn gate is not zero (Louizos et al., 2018, equation 12)."""
    return jax.nn.sigmoid(log_alpha - jnp.log(-LOW / HIGH))


def project(
    tuned: Tuned, variables: Mapping[str, Any], fraction: float
) -> tuple[Tuned, dict[str, Mapping[str, Any]]]:
    """The tuned model and delta in which only the largest `|z * w|` are left, and are stored alone.

    Kept are exactly `round(fraction * numbers)` differences of all that diff pruning acts on together, as
    `SparseOffset`; these can be trained further, which the paper finds important. Entries of other methods
    stay. Call it outside compiled functions. Raises `InputError` where there is no diff pruning, for a
    fraction out of range, and for differences that are not finite.
    """
    pruned = {entry.name: entry for entry in tuned.entries if isinstance(entry.method, DiffPruning)}
    require_variables(variables)
    trained, state = places(variables["delta"]), places(variables.get("delta_state", {}))
    gated = {place: _difference(pruned[place[1]], trained[place]) for place in trained if place[1] in pruned}
    if not gated:
        raise InputError("project: no entry of this tuned model is diff pruning")
    if not 0.0 < fraction <= 1.0:
        raise InputError(f"project: fraction={fraction} must be above 0 and at most 1")
    names = _new_names(tuned, pruned)
    for (path, name), (index, offset) in _largest(gated, fraction).items():
        del trained[path, name]
        if index.size:
            trained[path, names[name]] = {"offset": jnp.asarray(offset)}
            state[path, names[name]] = {"index": jnp.asarray(index, jnp.int32)}
    entries = tuple(
        Entry(names[entry.name], entry.address, SparseOffset()) if entry.name in pruned else entry
        for entry in tuned.entries
    )
    return replace(tuned, entries=entries), {"delta": from_places(trained), "delta_state": from_places(state)}


def _difference(entry: Entry, trained: Variables) -> np.ndarray:
    assert isinstance(entry.method, DiffPruning)
    return np.asarray(entry.method.difference(trained)).reshape(-1)


def _largest(
    gated: Mapping[Place, np.ndarray], fraction: float
) -> dict[Place, tuple[np.ndarray, np.ndarray]]:
    """Positions and values of the largest of all arrays together, by array; the first of equals."""
    for (path, _), values in gated.items():
        if not np.isfinite(values).all():
            raise InputError(f"project: the difference at {path} is not finite")
    sizes = [values.size for values in gated.values()]
    magnitude = np.concatenate([np.abs(values) for values in gated.values()])
    keep = np.zeros(magnitude.size, bool)
    keep[np.argsort(-magnitude, kind="stable")[: max(1, round(fraction * magnitude.size))]] = True
    parts = [np.flatnonzero(part) for part in np.split(keep, np.cumsum(sizes)[:-1])]
    return {place: (index, gated[place][index]) for place, index in zip(gated, parts)}


def _new_names(tuned: Tuned, pruned: Mapping[str, Entry]) -> dict[str, str]:
    """What the entries of diff pruning are called afterwards; names are not used twice."""
    taken = {entry.name for entry in tuned.entries}
    free = (name for i in range(len(taken) * 2 + 1) if (name := _numbered(i)) not in taken)
    return {name: next(free) for name in pruned}


def _numbered(number: int) -> str:
    return f"~{SparseOffset.name}_{number}" if number else f"~{SparseOffset.name}"
