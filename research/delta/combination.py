"""One LoRA from several: sums of their factors or of their products, pruned and voted on, as PEFT has it.

tuned, variables = combine([(sst2, v1), (rte, v2)], [0.7, 0.3], how="ties_svd", density=0.2)

`linear`, `ties`, `dare_*` and `magnitude_prune` act on A and on B, each with the square root of weight and
scale, the sign on A (PEFT's `add_weighted_adapter`, its pull request 2918 for the sign): cheap, and only a
rough stand-in for the sum of the products. `cat` is that sum exactly, at the sum of the ranks. With `svd`
they act on the products `s A B`, and a truncated singular value decomposition makes a LoRA of the result.

TIES: Yadav et al., 2023, arXiv 2306.01708; DARE: Yu et al., 2024, arXiv 2311.03099.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ... import InputError
from .attach import Entry, Tuned
from .joining import Delta, require_one_model
from .lora import LoRA
from .low_rank import product
from .trees import Place, Tree, from_places, variables_by_place

ON_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
ON_PRODUCTS = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
HOWS = ("cat", *ON_FACTORS, *ON_PRODUCTS)


Pair = tuple[jax.Array, jax.Array]


class Part(NamedTuple):
    """One delta's LoRA at a place: `a [..., in, r]`, `b [..., r, out]`, its weight and its scale."""

    a: jax.Array
    b: jax.Array
    weight: float
    scale: float


@dataclass(frozen=True)
class Rule:
    """How arrays `[N, ...]` of N deltas, with a weight each, become one: task arithmetic, TIES or DARE."""

    how: str
    density: float = 1.0
    frequency: bool = False

    def __call__(self, arrays: Sequence[jax.Array], weights: np.ndarray, key: jax.Array) -> jax.Array:
        """The combined array of one layer."""
        kept = self._pruned(jnp.stack(arrays), key)
        weighted = kept * jnp.asarray(weights, kept.dtype).reshape(-1, *[1] * (kept.ndim - 1))
        if not self.how.endswith("ties"):
            return weighted.sum(0)
        votes = (jnp.sign(kept) if self.frequency else kept).sum(0)
        agrees = jnp.sign(kept) == jnp.where(votes >= 0, 1, -1)
        return (weighted * agrees).sum(0) / jnp.maximum(agrees.sum(0), 1)

    def _pruned(self, stack: jax.Array, key: jax.Array) -> jax.Array:
        if self.density >= 1:
            return stack
        if self.how.startswith("dare"):
            keep = jax.random.bernoulli(key, self.density, stack.shape)
            return jnp.where(keep, stack / self.density, 0)
        return jax.vmap(partial(_largest, density=self.density))(stack)


def combine(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    how: str = "svd",
    *,
    rank: int | None = None,
    density: float | None = None,
    rng: jax.Array | None = None,
    frequency: bool = False,
) -> tuple[Tuned, dict[str, Tree]]:
    """One tuned model and its variables from LoRAs on one model; a weight may be negative.

    how        one of `HOWS`
    rank       of the result of `svd` and `*_svd`; by default the largest that comes in
    density    share of the numbers that `ties`, `dare_*` and `magnitude_prune` keep, of each array
    rng        for `dare_*`, which keep numbers at random and divide them by `density`
    frequency  TIES elects a sign by how many deltas have it, instead of by the sum of their numbers

    The result has a plain LoRA of scale 1 at each address that any of the deltas has. Raises `InputError` for
    other methods (`to_lora` converts them), ranks or addresses that do not fit together, and wrong options.
    """
    first, rule = require_one_model(deltas), _rule(how, density, rng, frequency)
    if len(weights) != len(deltas):
        raise InputError(f"combine got {len(weights)} weights for {len(deltas)} deltas; one each is valid")
    rng = jax.random.key(0) if rng is None else rng  # unused where nothing is drawn
    entries, groups = _by_address(deltas, weights)
    made: dict[Place, dict[str, jax.Array]] = {}
    for address, by_path in groups.items():
        new_rank = _rank(how, rank, address, by_path)
        entries[address] = replace(entries[address], method=LoRA(new_rank, alpha=float(new_rank)))
        for path, parts in by_path.items():
            key = jax.random.fold_in(rng, np.uint32(zlib.crc32(path.encode())))
            made[path, address] = _combined(parts, how, rule, new_rank, key)
    return _assembled(first, entries, made)


def _by_address(
    deltas: Sequence[Delta], weights: Sequence[float]
) -> tuple[dict[str, Entry], dict[str, dict[str, list[Part]]]]:
    """By address its entry, and by address and path what each delta has there."""
    entries: dict[str, Entry] = {}
    groups: dict[str, dict[str, list[Part]]] = {}
    where: dict[str, str] = {}
    for index, ((tuned, variables), weight) in enumerate(zip(deltas, weights)):
        by_name = {entry.name: entry for entry in tuned.entries}
        for (path, name), own in variables_by_place(variables).items():
            method, address = by_name[name].method, by_name[name].address.text
            if not isinstance(method, LoRA) or method.reads:
                raise InputError(
                    f"delta {index}, {path}: combine takes plain LoRAs, this is {method}; convert it by "
                    f"to_lora, or leave it out by without(variables, {name!r})"
                )
            if where.setdefault(path, address) != address:
                raise InputError(
                    f"{path}: delta {index} has it by address {address!r}, another by {where[path]!r}; "
                    f"attach them at the same addresses"
                )
            entries.setdefault(address, by_name[name])
            part = Part(own["a"], own["b"], float(weight), method.scale)
            groups.setdefault(address, {}).setdefault(path, []).append(part)
    if not groups:
        raise InputError("combine got no LoRA: all entries of its deltas are switched off")
    return entries, groups


def _combined(parts: list[Part], how: str, rule: Rule, rank: int, key: jax.Array) -> dict[str, jax.Array]:
    """A and B of the result at one place, for a scale of 1; each layer of a stack is combined for itself."""
    factors = np.array([part.weight * part.scale for part in parts])
    if how == "cat":
        scaled = [part.a * factor for part, factor in zip(parts, factors)]
        return {"a": jnp.concatenate(scaled, -1), "b": jnp.concatenate([part.b for part in parts], -2)}
    lead = parts[0].a.shape[:-2]
    flat = [(_rows(part.a), _rows(part.b)) for part in parts]
    keys = jax.random.split(key, math.prod(lead))
    weights, scales = np.array([[part.weight, part.scale] for part in parts]).T

    def on_factors(layer: Sequence[Pair], key: jax.Array) -> Pair:
        # The sign goes to one of the two: on both it would cancel.
        roots, first, second = np.sqrt(np.abs(factors)), *jax.random.split(key)
        each_a, each_b = zip(*layer)
        return rule(each_a, roots * np.sign(factors), first), rule(each_b, roots, second)

    def on_products(layer: Sequence[Pair], key: jax.Array) -> Pair:
        changes = [scale * product(a, b) for (a, b), scale in zip(layer, scales)]
        a, b, _ = truncated(rule(changes, weights, key), rank)
        return a, b

    a, b = jax.vmap(on_factors if how in ON_FACTORS else on_products)(flat, keys)
    return {"a": a.reshape(*lead, *a.shape[-2:]), "b": b.reshape(*lead, *b.shape[-2:])}


def _rows(x: jax.Array) -> jax.Array:
    """Matrices of all layers along one axis."""
    return x.reshape(-1, *x.shape[-2:])


def truncated(change: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best `a b` of this rank for `change [..., in, out]`, and all its singular values, largest first."""
    left, values, right = jnp.linalg.svd(change, full_matrices=False)
    roots = jnp.sqrt(values[..., :rank])
    return left[..., :rank] * roots[..., None, :], roots[..., :, None] * right[..., :rank, :], values


def _largest(x: jax.Array, density: float) -> jax.Array:
    """`x` with all but the share `density` of its largest numbers, by size, at zero."""
    count = int(density * x.size)
    kept = jax.lax.top_k(jnp.abs(x).ravel(), count)[1]
    return x * jnp.zeros(x.size, x.dtype).at[kept].set(1).reshape(x.shape)


def _rule(how: str, density: float | None, rng: jax.Array | None, frequency: bool) -> Rule:
    if how not in HOWS:
        raise InputError(f"how={how!r} is no way to combine; there are {', '.join(HOWS)}")
    base = "linear" if how == "svd" else how.removesuffix("_svd")
    prunes = base not in ("linear", "cat")
    if prunes and (density is None or not 0 < density <= 1):
        raise InputError(f"how={how!r} keeps a share of the numbers: density={density} must be in (0, 1]")
    if not prunes and density is not None:
        raise InputError(f"how={how!r} keeps all numbers; density={density} is for ties, dare and magnitude")
    if base.startswith("dare") and rng is None:
        raise InputError(f"how={how!r} draws at random; give rng=jax.random.key(seed)")
    return Rule(base, 1.0 if density is None else density, frequency)


def _rank(how: str, rank: int | None, address: str, by_path: dict[str, list[Part]]) -> int:
    """The rank of the result at an address."""
    places = list(by_path.values())
    ranks = [part.a.shape[-1] for part in places[0]]
    if how in ON_PRODUCTS:
        size = min(min(part.a.shape[-2], part.b.shape[-1]) for parts in places for part in parts)
        if rank is not None and not 1 <= rank <= size:
            raise InputError(f"{address}: rank={rank} of the combination must be 1-{size}, as its matrix has")
        return rank or max(ranks)
    if rank is not None:
        raise InputError(f"how={how!r} decides the rank by itself; rank={rank} is for svd")
    if how == "cat":
        return sum(ranks)
    if len(set(ranks)) > 1:
        raise InputError(
            f"{address}: how={how!r} adds factors, and their ranks are {', '.join(map(str, ranks))}; use cat "
            f"or an svd"
        )
    return ranks[0]


def _assembled(
    first: Tuned, entries: dict[str, Entry], made: dict[Place, dict[str, jax.Array]]
) -> tuple[Tuned, dict[str, Tree]]:
    """The tuned model of these entries, named in order; the places of `made` have addresses for names."""
    names = {address: f"~lora_{i}" if i else "~lora" for i, address in enumerate(entries)}
    renamed = tuple(replace(entry, name=names[address]) for address, entry in entries.items())
    delta = from_places({(path, names[address]): own for (path, address), own in made.items()})
    return replace(first, entries=renamed), {"delta": delta, "delta_state": {}}
