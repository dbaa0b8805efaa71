"""LoRA+: B learns faster than A (Hayou et al., 2024, arXiv 2402.12354)."""

from __future__ import annotations

import re
from math import inf
from typing import Any

import jax
import optax

from ... import InputError

SITE = re.compile(r"~(lora|dora|adalora)(_\d+)?")


def lora_plus(ratio: float = 16.0) -> optax.GradientTransformation:
    """Updates of every B of LoRA, DoRA and AdaLoRA times `ratio`; those of all else as they are.

    Chained behind an optimizer, learning rate included, it gives B that many times the rate, and that
    many times the decoupled weight decay, as a parameter group of its own would::

        optimizer = optax.chain(make_optimizer(config, steps), lora_plus(16))

    The authors' code suggests 16. Raises `InputError` for a ratio that is not positive, and where nothing
    that is trained has such a B.
    """
    if not 0 < ratio < inf:
        raise InputError(f"lora_plus ratio={ratio} must be above 0 and finite")

    def init(params: Any) -> optax.EmptyState:
        paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
        if not any(_is_b(path) for path in paths):
            raise InputError("lora_plus: nothing that is trained is the B of a LoRA, DoRA or AdaLoRA")
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        def faster(path: tuple, leaf: jax.Array) -> jax.Array:
            return leaf * ratio if _is_b(path) else leaf

        return jax.tree_util.tree_map_with_path(faster, updates), state

    return optax.GradientTransformation(init, update)


def _is_b(path: tuple) -> bool:
    names = [getattr(entry, "key", "") for entry in path[-2:]]
    return len(names) == 2 and names[1] == "b" and bool(SITE.fullmatch(str(names[0])))
