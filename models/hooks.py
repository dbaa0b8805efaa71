"""Reading and editing what flows through a model, by interception.

A `Hook` is a parameterless child that returns its input. `flax.linen.intercept_methods` sees its call,
so a function may read or replace the value there; when nobody looks, the traced program has no trace of
it. Any other child module is a site too: its output is what is read or replaced.

Names are regular expressions over `/` paths, anchored at a path component and at the end: `mlp/act`
is every layer's activation, `layers_3/mlp/act` one layer's, `attention/(query|key)` two projections.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict

from .. import InputError
from .model import Model, Params, as_linen

COLLECTION = "hooks"
LEAF = "~value"  # no module is called that; attention has a child "value"

Reduce = Callable[[str, jax.Array], Any]
Edit = Callable[[jax.Array], jax.Array]


class Hook(nn.Module):
    """Returns its input; there to be intercepted."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x`, unchanged."""
        return x


def matches(name: str, path: str) -> bool:
    """Whether the expression `name` fits the end of `path`, starting at a path component."""
    return re.search(rf"(^|/)(?:{name})$", path) is not None


def run_with_cache(
    model: Model | nn.Module,
    params: Params,
    *args: Any,
    names: Sequence[str],
    reduce: Reduce | None = None,
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Apply `model` and also return what flows through the sites that `names` match.

    `reduce(path, value)` turns a value into what is kept, inside the traced program, so that a statistic
    of `[B, T, F]` activations never holds them. Under scanned layers the kept values come back stacked
    `[L, ...]`. Pure; works under `jit`, `grad` and `vmap`. Raises `InputError` if a name matches nothing.
    """
    kept = reduce or (lambda path, value: value)
    seen: set[str] = set()

    def read(next_call: Callable, call_args: tuple, call_kwargs: dict, context: Any) -> Any:
        output = next_call(*call_args, **call_kwargs)
        path = _site_path(context)
        if path is not None and (found := [name for name in names if matches(name, path)]):
            seen.update(found)
            value = kept(path, output)
            context.module.sow(COLLECTION, LEAF, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        return output

    with nn.intercept_methods(read):
        outputs, state = as_linen(model).apply(params, *args, mutable=[COLLECTION], **kwargs)
    _require_all(names, seen)
    flat = flatten_dict(state.get(COLLECTION, {}), is_leaf=lambda path, _: path[-1:] == (LEAF,))
    return outputs, {"/".join(path[:-1]): value for path, value in flat.items()}


def run_with_edits(
    model: Model | nn.Module, params: Params, *args: Any, edits: Mapping[str, Edit], **kwargs: Any
) -> Any:
    """Apply `model` with the value at each site that a name in `edits` matches replaced by `edit(value)`.

    Under scanned layers an edit of `mlp/act` acts on every layer; to edit one layer, unroll the model
    (`unstack_layers`). Raises `InputError` if a name matches nothing.
    """
    seen: set[str] = set()

    def write(next_call: Callable, call_args: tuple, call_kwargs: dict, context: Any) -> Any:
        output = next_call(*call_args, **call_kwargs)
        path = _site_path(context)
        for name, edit in edits.items():
            if path is not None and matches(name, path):
                seen.add(name)
                output = edit(output)
        return output

    with nn.intercept_methods(write):
        outputs = as_linen(model).apply(params, *args, **kwargs)
    _require_all(list(edits), seen)
    return outputs


def _site_path(context: Any) -> str | None:
    """Path of an intercepted `__call__`, or None for other methods and the root."""
    if context.method_name != "__call__" or context.module.scope is None:
        return None
    return "/".join(context.module.scope.path) or None


def _require_all(names: Sequence[str], seen: set[str]) -> None:
    missing = [name for name in names if name not in seen]
    if missing:
        raise InputError(f"hook name {missing[0]!r} matches no site of the model; e.g. 'mlp/act' does")
