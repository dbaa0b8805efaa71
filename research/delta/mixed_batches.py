"""A batch whose rows belong to different tasks: each row with its own delta, on one backbone.

stacked = stack_tasks([sst2, trec, rte])                                   # variables of one specification
logits = apply_tasks(tuned, stacked, task, params, tokens)                 # task [B]; -1 is the backbone

`vmap` over rows and a gather over tasks. The products with the backbone's weights stay products of the whole
batch, because the weights have no axis over rows.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from ... import InputError
from .attach import Tuned
from .leaves import apply_leaf
from .methods import LeafMethod, SiteMethod
from .switching import Variables
from .trees import PARTS, Tree, from_places, node_at, places, variables_by_place, with_node

BACKBONE = -1


def stack_tasks(tasks: Sequence[Variables]) -> dict[str, Any]:
    """The variables of several tasks of one specification, with a leading axis over tasks.

    Raises `InputError` that names the first array in which a task differs from task 0.
    """
    if not tasks:
        raise InputError("stack_tasks got no task; give the variables of one or more")
    wanted = _shapes(tasks[0])
    for index, task in enumerate(tasks):
        found = _shapes(task)
        if different := sorted({path for path, _ in set(wanted.items()) ^ set(found.items())}):
            path = different[0]
            raise InputError(
                f"task {index}: {path} is {found.get(path, 'absent')}, in task 0 it is "
                f"{wanted.get(path, 'absent')}; tasks of one batch share one specification"
            )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(dict(task) for task in tasks))


def apply_tasks(
    tuned: Tuned,
    stacked: Variables,
    task: Any,
    params: Mapping[str, Any],
    tokens: jax.Array,
    *,
    rng: jax.Array | None = None,
    train: bool = False,
    whole: Collection[str] = (),
    **inputs: Any,
) -> Any:
    """Outputs for a batch whose row i is of task `task[i]`: what each row's own delta gives for it alone.

    `stacked` is what `stack_tasks` made, `task` integers `[B]`, `tokens` `[B, ...]`; task -1 is the plain
    backbone. Of `inputs`, arrays whose first axis is B go row by row; everything else, and what `whole`
    names, goes to every row as it is. A leaf method makes its array once for each row.

    Raises `InputError` for a task that is not stacked, and for the backbone beside a method that nothing
    switches off (soft prompts); where `task` is traced, such a row is NaN.
    """
    if inputs.get("cache") is not None:
        raise InputError("apply_tasks takes no cache: the rows of one cannot be told apart")
    if not (arrays := jax.tree.leaves(stacked)):
        raise InputError("apply_tasks: the tasks have no variables, all their entries are switched off")
    rows, count = tokens.shape[0], arrays[0].shape[0]
    task = _checked(task, rows, count, tuned)
    tuned.require_key(rng, train)
    passed = {name: inputs.pop(name) for name in whole if name in inputs}
    leaves, structure = jax.tree.flatten((tokens, inputs))
    by_row = {i: leaf for i, leaf in enumerate(leaves) if np.ndim(leaf) and np.shape(leaf)[0] == rows}
    keys = None if rng is None else jax.random.split(rng, rows)

    def one(index: jax.Array, row: Mapping[int, Any], key: jax.Array | None) -> Any:
        filled = [row[i][None] if i in row else leaf for i, leaf in enumerate(leaves)]
        own_tokens, own_inputs = jax.tree.unflatten(structure, filled)
        sites, variables, own_params = _of_task(tuned, stacked, index, count, params, key if train else None)
        outputs = sites.apply(variables, own_params, own_tokens, rng=key, train=train, **own_inputs, **passed)
        return jax.tree.map(lambda leaf: leaf[0], outputs)

    return jax.vmap(one, in_axes=(0, 0, None if keys is None else 0))(task, by_row, keys)


def _of_task(
    tuned: Tuned,
    stacked: Variables,
    index: jax.Array,
    count: int,
    params: Mapping[str, Any],
    rng: jax.Array | None,
) -> tuple[Tuned, dict[str, Tree], Mapping[str, Any]]:
    """One task's site methods with their variables, and parameters changed by its leaf methods.

    For the backbone, variables are neutral and parameters what they were.
    """
    plain = index == BACKBONE
    own = jax.tree.map(partial(_gathered, index=index, count=count), dict(stacked))
    by_place, leaves = variables_by_place(own), params
    for (path, entry), hit in tuned.hits(own, params).items():
        if isinstance(entry.method, LeafMethod):
            changed = apply_leaf(entry.method, by_place[path, entry.name], leaves, path, hit, rng)
            chosen = jnp.where(plain, node_at(params, path), node_at(changed, path))
            leaves = with_node(leaves, path, chosen)
    neutral = {e.name: e.method.neutral for e in tuned.entries if isinstance(e.method, SiteMethod)}
    kept: dict[str, Tree] = {}
    for part in PARTS:
        found = {place: each for place, each in places(own.get(part, {})).items() if place[1] in neutral}
        kept[part] = from_places(
            {place: _where(plain, neutral[place[1]], each) for place, each in found.items()}
        )
    return replace(tuned, entries=tuple(e for e in tuned.entries if e.name in neutral)), kept, leaves


def _gathered(leaf: jax.Array, index: jax.Array, count: int) -> jax.Array:
    """The row of a task; of one that is not there NaN, instead of another task's."""
    valid = jnp.where(index < BACKBONE, count, jnp.maximum(index, 0))
    return leaf.at[valid].get(mode="fill")


def _where(condition: jax.Array, value: float, tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jnp.where(condition, jnp.asarray(value, leaf.dtype), leaf), tree)


def _checked(task: Any, rows: int, count: int, tuned: Tuned) -> jax.Array:
    if not isinstance(task, jax.core.Tracer):
        found = np.asarray(task)
        if found.shape != (rows,) or not np.issubdtype(found.dtype, np.integer):
            raise InputError(f"task is {found.dtype} {found.shape}; one integer for each of {rows} rows")
        if wrong := [int(each) for each in found if not BACKBONE <= each < count]:
            raise InputError(f"task {wrong[0]} of a row; there are 0-{count - 1}, and -1 for the backbone")
        stuck = [e.method for e in tuned.entries if math.isnan(getattr(e.method, "neutral", 0.0))]
        if stuck and (found == BACKBONE).any():
            raise InputError(
                f"task -1 of a row is the backbone, but {type(stuck[0]).__name__} cannot be switched off in "
                f"a batch; run such rows by themselves"
            )
    return jnp.asarray(task)


def _shapes(task: Variables) -> dict[str, str]:
    flat = flatten_dict(dict(task), sep="/")
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in flat.items() if hasattr(leaf, "shape")}
