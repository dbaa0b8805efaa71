"""AdaLoRA's budget: which singular values of all sites are kept (Zhang et al., 2023, arXiv 2303.10512).

    optimizer = rank_allocation(make_optimizer(config, steps), target=8, steps=steps, final=steps // 4)

Everything that decides lies in the optimizer's state, so a checkpoint resumes the allocation as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from ... import InputError

Tree = Any
Key = tuple[str, ...]
Sites = Mapping[Key, Mapping[str, jax.Array]]
SITE = re.compile(r"~adalora(_\d+)?")


class RankAllocationState(NamedTuple):
    """Finished updates, the smoothed `|weight * gradient|`, how much it varies, the wrapped state."""

    step: jax.Array
    importance: Tree
    uncertainty: Tree
    optimizer: optax.OptState


@dataclass(frozen=True)
class Budget:
    """How many singular values are kept, all sites together, and when the rest is set to zero.

    A cube from all of them after `warmup` steps down to `target` a site, `final` steps before the end, with
    zeros set every `every` steps; from then on in each step.
    """

    target: int
    steps: int
    warmup: int
    final: int
    every: int

    def table(self, start: int, sites: int) -> np.ndarray:
        """What is kept in steps 0 to `steps` of `start` values at `sites` sites."""
        return np.array(
            [self.at(step, start, self.target * sites) for step in range(self.steps + 1)], np.int32
        )

    def at(self, step: int, start: int, target: int) -> int:
        """What is kept in one step; equation 12 of the paper, rounded down."""
        if step <= self.warmup:
            return start
        if step > self.steps - self.final:
            return target
        left = 1 - (step - self.warmup) / (self.steps - self.final - self.warmup)
        return int((start - target) * left**3 + target)

    def masks(self, step: jax.Array) -> jax.Array:
        """Whether zeros are set in this step."""
        return (step > self.steps - self.final) | ((step > self.warmup) & (step % self.every == 0))


def rank_allocation(
    optimizer: optax.GradientTransformation,
    *,
    target: int,
    steps: int,
    warmup: int = 0,
    final: int = 1,
    every: int = 1,
    smoothing: tuple[float, float] = (0.85, 0.85),
) -> optax.GradientTransformationExtraArgs:
    """`optimizer`, after whose updates the least important `e` of the AdaLoRA sites become zero.

    The score of a triplet, a column of A, its `e` and a row of B, is that of `e` plus the means over the
    other two; that of a weight is importance times uncertainty, moving averages (`smoothing`) of
    `|weight * gradient|` and of its distance from its average, taken with the weights after the update, as
    in the authors' code and PEFT. Scores stop moving `final` steps before the end, after which what is zero
    stays zero. Steps count from 1. Must be outermost: what changes its updates again, as a learning rate
    behind it would, undoes the zeros. Raises `InputError` where a number is out of range or no site is
    AdaLoRA.
    """
    budget = Budget(target, steps, warmup, final, every)
    _require(budget, smoothing)
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: Tree) -> RankAllocationState:
        sites = _sites(params)
        if (rank := min(_rank(site) for site in sites.values())) < target:
            raise InputError(f"rank_allocation target={target} is above the rank {rank} of an AdaLoRA site")
        # Apart: a state whose arrays share memory cannot be donated.
        one, other = (jax.tree.map(jnp.zeros_like, unflatten_dict(dict(sites))) for _ in range(2))
        return RankAllocationState(jnp.zeros((), jnp.int32), one, other, optimizer.init(params))

    def update(gradients: Tree, state: RankAllocationState, params: Tree = None, **extra: Any) -> Any:
        if params is None:
            raise InputError("rank_allocation needs the parameters: update(gradients, state, params)")
        updates, inner = optimizer.update(gradients, state.optimizer, params, **extra)
        step = state.step + 1
        moved = unflatten_dict(_sites(optax.apply_updates(params, updates)))
        slopes = unflatten_dict(_sites(gradients))
        averages = _averaged(state, moved, slopes, smoothing)
        moving = step < steps - final
        importance, uncertainty = (
            jax.tree.map(lambda new, old: jnp.where(moving, new, old), *pair)
            for pair in zip(averages, (state.importance, state.uncertainty))
        )
        scores = _scores(_sites(importance), _sites(uncertainty))
        kept = jnp.asarray(budget.table(sum(each.size for each in scores.values()), _count(scores)))[step]
        updates = _without(updates, params, _lowest(scores, kept), budget.masks(step))
        return updates, RankAllocationState(step, importance, uncertainty, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _require(budget: Budget, smoothing: tuple[float, float]) -> None:
    least = {"target": 1, "steps": 1, "warmup": 0, "final": 1, "every": 1}
    for name, low in least.items():
        if (value := getattr(budget, name)) < low:
            raise InputError(f"rank_allocation {name}={value} must be at least {low}")
    if budget.warmup + budget.final >= budget.steps:
        raise InputError(
            f"rank_allocation warmup={budget.warmup} and final={budget.final} leave none of the "
            f"{budget.steps} steps in between"
        )
    if not all(0.0 < decay < 1.0 for decay in smoothing):
        raise InputError(f"rank_allocation smoothing={smoothing} must lie between 0 and 1")


def _sites(tree: Tree) -> Sites:
    """The variables of AdaLoRA's sites in a tree like the delta, by where they are."""
    found: dict[Key, dict[str, jax.Array]] = {}
    for keys, leaf in flatten_dict(dict(tree)).items():
        if len(keys) > 1 and SITE.fullmatch(keys[-2]) and keys[-1] in ("a", "e", "b"):
            found.setdefault(keys[:-1], {})[keys[-1]] = leaf
    if not found:
        raise InputError("rank_allocation: nothing that is trained is AdaLoRA's ('~adalora' with a, e and b)")
    return found


def _rank(site: Mapping[str, jax.Array]) -> int:
    return site["e"].shape[-1]


def _count(scores: Mapping[Key, jax.Array]) -> int:
    """Matrices, those of stacked layers one by one."""
    return sum(each.size // each.shape[-1] for each in scores.values())


def _averaged(
    state: RankAllocationState, weights: Tree, gradients: Tree, smoothing: tuple[float, float]
) -> tuple[Tree, Tree]:
    first, second = smoothing
    now = jax.tree.map(lambda weight, slope: jnp.abs(weight * slope), weights, gradients)
    importance = jax.tree.map(lambda old, new: first * old + (1 - first) * new, state.importance, now)
    uncertainty = jax.tree.map(
        lambda old, new, mean: second * old + (1 - second) * jnp.abs(new - mean),
        state.uncertainty,
        now,
        importance,
    )
    return importance, uncertainty


def _scores(importance: Sites, uncertainty: Sites) -> dict[Key, jax.Array]:
    """A number for each triplet, `[..., rank]` by site."""
    found = {}
    for keys, site in importance.items():
        product = {name: site[name] * uncertainty[keys][name] for name in site}
        found[keys] = product["e"] + product["a"].mean(-2) + product["b"].mean(-1)
    return found


def _lowest(scores: Mapping[Key, jax.Array], kept: jax.Array) -> dict[Key, jax.Array]:
    """Which triplets are not among the `kept` best of all sites; of equal ones the later stay."""
    everything = jnp.concatenate([each.ravel() for each in scores.values()])
    order = jnp.argsort(jnp.argsort(everything))
    lowest, found, start = order < everything.size - kept, {}, 0
    for keys, each in scores.items():
        found[keys] = lowest[start : start + each.size].reshape(each.shape)
        start += each.size
    return found


def _without(updates: Tree, params: Tree, lowest: Mapping[Key, jax.Array], now: jax.Array) -> Tree:
    """Updates after which the `lowest` are exactly zero, if `now`."""
    flat, values = flatten_dict(dict(updates)), flatten_dict(dict(params))
    for keys, mask in lowest.items():
        place = (*keys, "e")
        flat[place] = jnp.where(mask & now, -values[place].astype(flat[place].dtype), flat[place])
    return unflatten_dict(flat)
