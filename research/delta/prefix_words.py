"""Prefixes that start as the keys and values of words (Li and Liang, 2021, arXiv 2101.00190).

How a prefix starts matters: PEFT's table for GSM8K has 41.6% for 50 tokens begun like this, at rate 0.005,
and 18.6% from noise, at rate 0.001 (`method_comparison/MetaMathQA`; rate and length differ too).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ... import InputError
from ...models.model import as_linen
from .attach import Tuned
from .prefix import Prefix
from .sites import path_of
from .trees import Place, from_places, node_at, places

COLLECTION, NAME = "prefix_words", "~attended"


def prefix_from_words(
    tuned: Tuned, variables: Mapping[str, Any], params: Mapping[str, Any], tokens: Sequence[int]
) -> dict[str, Any]:
    """`variables` whose prefixes are what each attention makes of `tokens` read alone, repeated up to n.

    With `ShiftPositions(n)` beside it, a causal model without distance biases starts by computing what it
    would with these words in front. Raises `InputError` where there is no plain `Prefix` in self-attention.
    """
    entries = {entry.name: entry.method for entry in tuned.entries if isinstance(entry.method, Prefix)}
    if not entries:
        raise InputError("prefix_from_words: no entry is a Prefix")
    ids = _ids(tokens, getattr(getattr(tuned.model, "config", None), "vocab", None))
    hits = tuned.hits(variables, params)
    attended: dict[int, Any] = {}
    found: dict[Place, Any] = places(variables["delta"])
    for (path, entry), hit in hits.items():
        if entry.name not in entries:
            continue
        method = entries[entry.name]
        if method.reparameterise or method.at != "attend":
            raise InputError(f"{path}: prefix_from_words sets plain prefixes of our attention, not {method}")
        if method.length not in attended:
            attended[method.length] = _attended(tuned, params, np.resize(ids, method.length))
        seen = node_at(attended[method.length], path)
        kept = None if seen is None else seen[NAME]
        own = found[path, entry.name]
        rows = slice(None) if hit.rows is None else np.asarray(hit.rows)
        # Copies: two prefixes of one layer must not share memory, an optimizer step may donate them.
        made = kept and {
            name: jnp.array(kept[name][rows], own[name].dtype, copy=True) for name in ("key", "value")
        }
        if not made or jax.tree.map(jnp.shape, made) != jax.tree.map(jnp.shape, dict(own)):
            raise InputError(f"{path}: words alone make no {method.length} keys for this attention")
        found[path, entry.name] = made
    return {**variables, "delta": from_places(found)}


def _ids(tokens: Sequence[int], vocab: int | None) -> np.ndarray:
    """The tokens `[n]`; raises `InputError` where they are no ids of a vocabulary of this size."""
    ids = np.asarray(tokens)
    if not ids.size:
        raise InputError("prefix_from_words: tokens is empty; give the ids of at least one word")
    if not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"prefix_from_words: tokens are {ids.dtype}, not integers")
    if vocab and (wrong := [int(each) for each in ids.ravel() if not 0 <= each < vocab]):
        raise InputError(f"prefix_from_words: tokens={wrong[0]} is not in the vocabulary of {vocab}")
    return ids


def _attended(tuned: Tuned, params: Mapping[str, Any], tokens: np.ndarray) -> Mapping[str, Any]:
    """By path of each attention, the keys and values `[n, G, K]` that its core is called with."""

    def keep(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        if context.method_name == "attend" and path_of(context.module):
            value = {"key": args[1][0], "value": args[2][0]}
            context.module.sow(COLLECTION, NAME, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        return call(*args, **kwargs)

    def run(params: Mapping[str, Any]) -> Any:
        with nn.intercept_methods(keep):
            return as_linen(tuned.model).apply(params, tokens[None], mutable=[COLLECTION])[1]

    return jax.jit(run)(params)[COLLECTION]
