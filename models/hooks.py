"""Reading and editing what flows through a model, by interception.

A `Hook` is a parameterless child that returns its input. `flax.linen.intercept_methods` sees its call,
so a function may read or replace the value there; when nobody looks, the traced program has no trace of
it. Any other child module is a site too: its output is what is read or replaced.

Names are regular expressions over `/` paths, anchored at a path component and at the end: `mlp/act`
is every layer's activation, `layers_3/mlp/act` one layer's, `attention/(query|key)` two projections.

Everything is entered inside the call and left with it: there is no global state, and a compiled function
that reads or edits goes on doing so. What an edit is to depend on is an argument (`Given`), not a closure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from .. import InputError
from .model import Model, Params, as_linen

COLLECTION = "hooks"
EDITS = "edits"
LEAF = "~value"  # no module is called that; attention has a child "value"

Reduce = Callable[[str, jax.Array], Any]
Read = Callable[[Any, Callable[..., Any], tuple, dict[str, Any]], tuple[Any, Any]]


class Hook(nn.Module):
    """Returns its input; there to be intercepted."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x`, unchanged."""
        return x


@dataclass(frozen=True)
class Given:
    """An edit with data: the value at each path of `values` becomes `function(value, values[path])`.

    Paths are those that `run_with_cache` returns, and so are the shapes: under scanned layers the data have
    an axis `[L, ...]` in front, of which each layer gets its row. Data may be traced, differentiated and
    mapped over: thousands of interventions are one compiled program.
    """

    function: Callable[[jax.Array, Any], jax.Array]
    values: Mapping[str, Any]


Edit = Callable[[jax.Array], jax.Array] | Given


def matches(name: str, path: str) -> bool:
    """Whether the expression `name` fits the end of `path`, starting at a path component."""
    return re.search(rf"(^|/)(?:{name})$", path) is not None


def run_with_cache(
    model: Model | nn.Module,
    params: Params,
    *args: Any,
    names: Sequence[str],
    reduce: Reduce | None = None,
    edits: Mapping[str, Edit] | None = None,
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Apply `model` and also return what flows through the sites that `names` match.

    With `edits`, as of `run_with_edits`: what flows there under them, at an edited site what it becomes.

    `reduce(path, value)` turns a value into what is kept, inside the traced program, so that a statistic
    of `[B, T, F]` activations never holds them. Under scanned layers the kept values come back stacked
    `[L, ...]`; a module that is called several times gives a tuple, an entry a call. Pure; works under
    `jit`, `grad` and `vmap`. Raises `InputError` if a name matches nothing, and where a lifted
    transformation of the model keeps what was read from coming out.
    """
    kept, editing = reduce or (lambda path, value: value), _Editing(edits or {}, kwargs)
    seen: set[str] = set()

    def read(context: Any, call: Callable[..., Any], call_args: tuple, call_kwargs: dict) -> tuple[Any, Any]:
        output, path = editing.write(call, call_args, call_kwargs, context), _site_path(context)
        found = [] if path is None else [name for name in names if matches(name, path)]
        seen.update(found)
        return output, kept(path, output) if path is not None and found else None

    result = collect(model, params, *args, read=read, **editing.inputs, **kwargs)
    _require_all(names, seen)
    editing.require_used()
    return result


def collect(
    model: Model | nn.Module, params: Params, *args: Any, read: Read, **kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    """Apply `model` with `read(context, call, args, kwargs)` in place of each method call of its modules.

    `read` returns the call's output and what is to be kept of it (None: nothing), which comes back by the
    module's path, as `run_with_cache` says.
    """
    kept_at: set[str] = set()

    def intercept(call: Callable, call_args: tuple, call_kwargs: dict, context: Any) -> Any:
        output, value = read(context, call, call_args, call_kwargs)
        if value is not None:
            kept_at.add("/".join(context.module.scope.path))
            context.module.sow(COLLECTION, LEAF, value)  # a tuple, which grows with each call
        return output

    with nn.intercept_methods(intercept):
        outputs, state = as_linen(model).apply(params, *args, mutable=[COLLECTION], **kwargs)
    flat = flatten_dict(state.get(COLLECTION, {}), is_leaf=lambda path, _: path[-1:] == (LEAF,))
    values = {"/".join(path[:-1]): value[0] if len(value) == 1 else value for path, value in flat.items()}
    if lost := sorted(kept_at - values.keys()):
        raise InputError(
            f"{lost[0]} was read, but a lifted transformation above it does not hand out the collection "
            f"{COLLECTION!r}; give nn.scan or nn.vmap variable_axes={{{COLLECTION!r}: 0}}"
        )
    return outputs, values


def site_shapes(
    model: Model | nn.Module, params: Params, *args: Any, names: Sequence[str], **kwargs: Any
) -> dict[str, Any]:
    """Shapes and dtypes of what `run_with_cache` would return, by path; nothing is computed."""
    return jax.eval_shape(lambda: run_with_cache(model, params, *args, names=names, **kwargs)[1])


def run_with_edits(
    model: Model | nn.Module, params: Params, *args: Any, edits: Mapping[str, Edit], **kwargs: Any
) -> Any:
    """Apply `model` with the value at each site that a name in `edits` matches replaced by `edit(value)`.

    Under scanned layers a plain function at `mlp/act` acts on every layer alike; `Given` has data for each.
    Raises `InputError` if a name matches nothing, if data are for a path that the name does not match or
    that is not called, and for data together with a cache.
    """
    editing = _Editing(edits, kwargs)
    with nn.intercept_methods(editing.write):
        outputs = as_linen(model).apply(params, *args, **editing.inputs, **kwargs)
    editing.require_used()
    return outputs


class _Editing:
    """Edits on their way into one call of a model, and which of them it met."""

    def __init__(self, edits: Mapping[str, Edit], kwargs: Mapping[str, Any]) -> None:
        self.edits, self.data, self.seen = edits, _data_of(edits), set[str]()
        if self.data and kwargs.get("cache") is not None:
            raise InputError("edits with data (Given) are for calls without a cache")

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model's `apply` takes for them."""
        return {"kept": {EDITS: unflatten_dict(self.data, sep="/")}} if self.data else {}

    def write(self, next_call: Callable, call_args: tuple, call_kwargs: dict, context: Any) -> Any:
        """The output of an intercepted call as the edits leave it."""
        output, path = next_call(*call_args, **call_kwargs), _site_path(context)
        for number, (name, edit) in enumerate(self.edits.items()):
            if path is None or not matches(name, path):
                continue
            if not isinstance(edit, Given):
                self.seen.add(name)
                output = edit(output)
            elif context.module.scope.has_variable(EDITS, _leaf(number)):
                self.seen.add(path)
                output = edit.function(output, context.module.scope.get_variable(EDITS, _leaf(number)))
        return output

    def require_used(self) -> None:
        """Raise `InputError` for an edit that met no site."""
        _require_all([name for name, edit in self.edits.items() if not isinstance(edit, Given)], self.seen)
        if unused := [path for path in self.data if path.rpartition("/")[0] not in self.seen]:
            raise InputError(
                f"data for an edit at {unused[0].rpartition('/')[0]!r}: the model calls no such site, or a "
                f"lifted transformation above it does not hand in the collection {EDITS!r}"
            )


def _data_of(edits: Mapping[str, Edit]) -> dict[str, Any]:
    """The data of `Given` edits, by the path of a leaf in the collection `edits`."""
    data = {}
    for number, (name, edit) in enumerate(edits.items()):
        for path, value in edit.values.items() if isinstance(edit, Given) else ():
            if not matches(name, path):
                raise InputError(f"edit {name!r} has data for {path!r}, which it does not match")
            data[f"{path}/{_leaf(number)}"] = value
    return data


def _leaf(number: int) -> str:
    return f"{LEAF}_{number}"


def _site_path(context: Any) -> str | None:
    """Path of an intercepted `__call__`, or None for other methods and the root."""
    if context.method_name != "__call__" or context.module.scope is None:
        return None
    return "/".join(context.module.scope.path) or None


def _require_all(names: Sequence[str], seen: set[str]) -> None:
    missing = [name for name in names if name not in seen]
    if missing:
        raise InputError(f"hook name {missing[0]!r} matches no site of the model; e.g. 'mlp/act' does")
