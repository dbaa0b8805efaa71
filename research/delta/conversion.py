"""Other methods' deltas as plain LoRA: what every tool reads, what `combine` takes, what serves quickest.

PiSSA and OLoRA (at twice the rank), AdaLoRA (without its pruned triplets) and VeRA have an exact form. What
another mergeable method does to a kernel is seen by merging it, and its truncated singular value
decomposition is the nearest LoRA of that rank (Eckart and Young, 1936, Psychometrika 1(3)).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ... import InputError
from .addresses import Hit
from .attach import Entry, Tuned
from .combination import truncated
from .joining import names_in_order
from .lora import LoRA
from .low_rank import wide
from .methods import SiteMethod, Variables
from .sites import spread
from .switching import entry_names, only
from .trees import PARTS, Place, Tree, from_places, node_at, own_params, places, variables_by_place, with_node

Factors = tuple[jax.Array, jax.Array]


class Converted(NamedTuple):
    """A tuned model of plain LoRAs, its variables, and what part of each update they miss (norms).

    `residual` has a figure by path of the site and name of the entry that was converted, 0 where it is exact.
    """

    tuned: Tuned
    variables: dict[str, Tree]
    residual: dict[str, float]


def to_lora(
    tuned: Tuned,
    variables: Mapping[str, Any],
    params: Mapping[str, Any],
    rank: int | float | None = None,
) -> Converted:
    """The same deltas with every site method as a plain LoRA; leaf methods and plain LoRAs stay as they are.

    `rank` is a number, or the share of the update's energy (squared singular values) to keep, between 0 and
    1; one rank serves all sites of an entry. Exact forms are taken where `rank` has room for them, and need
    none given. Entries keep their order and get the names that `attach` would give.

    Raises `InputError` for a method that cannot be merged or also changes a bias, for one without exact form
    where no rank is given, and for a rank that a matrix has not. Not for use under `jit`.
    """
    _require_rank(rank)
    own, hits = variables_by_place(variables), tuned.hits(variables, params)
    merged: Mapping[str, Any] = _with_leaves(tuned, variables, params)
    entries: list[Entry] = []
    made: dict[Place, Factors] = {}
    residual: dict[str, float] = {}
    for entry in tuned.entries:
        method = entry.method
        entries.append(entry)
        if not isinstance(method, SiteMethod):
            continue
        found = {path: own[path, entry.name] for (path, each) in hits if each == entry}
        if not found:  # it is switched off
            continue
        changes = {}
        for path, each in found.items():
            merged, changes[path] = _merged_at(merged, path, method, each, hits[path, entry])
        if isinstance(method, LoRA) and not method.reads:
            continue
        factors = _exact(method, found)
        if factors is None or (rank is not None and not _has_room(rank, factors)):
            factors, missing = _nearest(entry, changes, found, rank)
            residual |= missing
        else:
            residual |= {f"{path}/{entry.name}": 0.0 for path in factors}
        new_rank = next(iter(factors.values()))[0].shape[-1]
        entries[-1] = replace(entry, method=LoRA(new_rank, alpha=float(new_rank)))
        made |= {(path, entry.name): each for path, each in factors.items()}
    return _renamed(tuned, entries, made, variables, residual)


def _merged_at(
    params: Mapping[str, Any], path: str, method: SiteMethod, own: Variables, hit: Hit
) -> tuple[Mapping[str, Any], jax.Array]:
    """`params` with one site merged, in single precision or better, and what that added to its kernel.

    The change `[..., in, out]` has the layers that the delta has. Raises `InputError` where more changes than
    the kernel.
    """
    old = jax.tree.map(lambda leaf: wide(leaf, leaf.shape), own_params(node_at(params, path)))
    new = dict(method.merge(spread(own, hit, method.neutral), old, path))
    kernel = "kernel" if "kernel" in old else "embedding"
    for name, leaf in new.items():
        if name != kernel and not np.array_equal(leaf, old[name]):
            raise InputError(
                f"{path}: {type(method).__name__} changes {name!r} too, and a LoRA holds a change of "
                f"{kernel!r} alone; merge it instead"
            )
    change = new[kernel] - old[kernel]
    change = change if hit.rows is None else change[np.asarray(hit.rows)]
    return ({**params, **new} if path == "" else with_node(params, path, new)), change


def _twice_the_rank(method: Any, own: Variables) -> Factors:
    """PiSSA and OLoRA: `A B - A_start B_start` as one product."""
    a = jnp.concatenate([own["a"], own["start_a"]], -1)
    return a, jnp.concatenate([own["b"], -own["start_b"]], -2) * method.scale


def _without_pruned(method: Any, own: Variables) -> Factors:
    """AdaLoRA: `e` folded into A, of as many triplets as the layer with most has left."""
    kept = max(1, int((own["e"] != 0).sum(-1).max()))
    largest = jnp.argsort(-jnp.abs(own["e"]), axis=-1)[..., :kept]
    a = jnp.take_along_axis(own["a"] * own["e"][..., None, :], largest[..., None, :], axis=-1)
    return a * method.scale, jnp.take_along_axis(own["b"], largest[..., :, None], axis=-2)


def _folded(method: Any, own: Variables) -> Factors:
    """VeRA: both vectors folded into the fixed matrices."""
    return own["a"] * own["lambda_d"][..., None, :], own["b"] * own["lambda_b"][..., None, :]


EXACT: Mapping[str, Callable[[Any, Variables], Factors]] = {
    "lora": _twice_the_rank,
    "adalora": _without_pruned,
    "vera": _folded,
}


def _exact(method: SiteMethod, found: Mapping[str, Variables]) -> dict[str, Factors] | None:
    """By path A and B whose product is the change of the kernel, at one rank; None where none are known."""
    if method.name not in EXACT:
        return None
    factors = {path: EXACT[method.name](method, own) for path, own in found.items()}
    rank = max(a.shape[-1] for a, _ in factors.values())
    return {path: (_padded(a, -1, rank), _padded(b, -2, rank)) for path, (a, b) in factors.items()}


def _padded(x: jax.Array, axis: int, size: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def _has_room(rank: int | float, factors: Mapping[str, Factors]) -> bool:
    return isinstance(rank, int) and all(a.shape[-1] <= rank for a, _ in factors.values())


def _nearest(
    entry: Entry, changes: Mapping[str, jax.Array], found: Mapping[str, Variables], rank: int | float | None
) -> tuple[dict[str, Factors], dict[str, float]]:
    """By path the best A and B for the changes of the kernels, at one rank, and what they miss."""
    name = type(entry.method).__name__
    if rank is None:
        raise InputError(
            f"delta {entry.name!r}: {name}'s update is not of low rank; give rank=, a number or the share of "
            f"its energy to keep, such as 0.99"
        )
    matrices = {path: _as_matrix(path, change, found[path]) for path, change in changes.items()}
    size = min(min(matrix.shape[-2:]) for matrix in matrices.values())
    if isinstance(rank, int) and rank > size:
        raise InputError(
            f"delta {entry.name!r}: rank={rank} exceeds its smallest matrix; at most {size} fits"
        )
    whole = {path: truncated(matrix, min(matrix.shape[-2:])) for path, matrix in matrices.items()}
    values = {path: np.asarray(each[2], np.float64) for path, each in whole.items()}
    kept = rank if isinstance(rank, int) else max(_rank_of(each, rank) for each in values.values())
    factors = {path: (a[..., :kept], b[..., :kept, :]) for path, (a, b, _) in whole.items()}
    missing = {f"{path}/{entry.name}": _share_after(each, kept) for path, each in values.items()}
    return factors, missing


def _share_after(values: np.ndarray, kept: int) -> float:
    """The norm of the singular values `[..., n]` from `kept` on, relative to that of all."""
    norm = np.linalg.norm(values)
    return float(np.linalg.norm(values[..., kept:]) / norm) if norm else 0.0


def _rank_of(values: np.ndarray, share: float) -> int:
    """How many singular values `[..., n]` hold this share of the squares, in the layer that needs most."""
    energy = np.cumsum(values**2, -1)
    enough = energy >= share * energy[..., -1:]
    return int(enough.argmax(-1).max()) + 1


def _as_matrix(path: str, change: jax.Array, own: Variables) -> jax.Array:
    """A kernel's change as `[..., in, out]`, where it contracts or makes several axes."""
    if "a" in own and "b" in own:
        return change.reshape(*own["a"].shape[:-2], own["a"].shape[-2], own["b"].shape[-1])
    layers = {"blocks": 2, "scale": 1}
    lead = next((own[name].ndim - axes for name, axes in layers.items() if name in own), 0)
    if change.ndim - lead != 2:
        raise InputError(
            f"{path}: which axes of its kernel {change.shape} are inputs cannot be told from the delta; merge"
        )
    return change


def _with_leaves(tuned: Tuned, variables: Mapping[str, Any], params: Mapping[str, Any]) -> Tree:
    leaves = {entry.name for entry in tuned.entries if not isinstance(entry.method, SiteMethod)}
    return tuned.merge(params, only(variables, leaves & entry_names(variables)))


def _renamed(
    tuned: Tuned,
    entries: list[Entry],
    made: Mapping[Place, Factors],
    variables: Mapping[str, Any],
    residual: dict[str, float],
) -> Converted:
    names = names_in_order([entries])[0]
    found: dict[str, dict[Place, Variables]] = {part: {} for part in PARTS}
    for part in PARTS:
        for (path, name), own in places(variables.get(part, {})).items():
            if (path, name) not in made:
                found[part][path, names[name]] = own
    for (path, name), (a, b) in made.items():
        found["delta"][path, names[name]] = {"a": a, "b": b}
    renamed = tuple(replace(entry, name=names[entry.name]) for entry in entries)
    trees = {part: from_places(each) for part, each in found.items()}
    return Converted(replace(tuned, entries=renamed), trees, residual)


def _require_rank(rank: int | float | None) -> None:
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if rank is not None and not whole and not (isinstance(rank, float) and 0 < rank < 1):
        raise InputError(
            f"rank={rank!r} is neither a number from 1 nor a share of the energy between 0 and 1"
        )
