"""Deltas at module calls, by `flax.linen.intercept_methods`: no model code changes.

A delta's variables are merged into the `params` collection under `~name` in its site's scope, so that
scan and vmap slice them per layer as they slice the site's own parameters. What this relies on, each with
a test: the interceptor is entered inside the traced function (one entered outside is ignored by a program
that is compiled already, or leaks into the next); methods are functions and never Flax modules (a module
that called the site would adopt it as its child); a subclass whose `__call__` calls its parent's is one
site, not two; nothing per layer is closed over.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from ... import InputError
from ...models.model import as_linen
from .addresses import Hit, above_path, stack
from .methods import Site, SiteMethod, Variables
from .trees import Place, node_at, own_params


@dataclass(frozen=True)
class Call:
    """A module's first call in a pass over shapes.

    `lead` are the axes that scan and vmap put in front of the module's parameters, `stack` is the path of
    the outermost module that has any.
    """

    module: nn.Module
    args: tuple
    output: Any
    lead: tuple[int, ...]
    stack: str | None


@runtime_checkable
class SiteModel(Protocol):
    """A model that is no Linen module and finds and adapts calls in its own way, as NNX models do."""

    def find_calls(
        self, params: Variables, args: tuple, kwargs: dict, at: set[str]
    ) -> dict[str, dict[str, Call]]:
        """What `find_calls` of this module returns."""

    def apply_sites(
        self,
        params: Mapping[str, Any],
        methods: Mapping[str, SiteMethod],
        expected: Iterable[Place],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Any:
        """What `apply_sites` of this module returns."""


def find_calls(
    model: Any, params: Variables, args: tuple, kwargs: dict, at: set[str]
) -> dict[str, dict[str, Call]]:
    """The calls that `model.apply(params, *args, **kwargs)` makes, by method (those in `at`) and module path.

    Only shapes are computed. Raises `InputError` for a model whose calls nothing can intercept.
    """
    if isinstance(model, SiteModel):
        return model.find_calls(params, args, kwargs, at)
    linen = as_linen(model)
    leads: dict[str, tuple[int, ...]] = {}
    calls: dict[str, dict[str, Call]] = {name: {} for name in at}

    def record(module: nn.Module, name: str, call: Callable, call_args: tuple, call_kwargs: dict) -> Any:
        path = path_of(module)
        leads.setdefault(path, _lead(module, params, leads))
        output = call(*call_args, **call_kwargs)
        if name in at and path not in calls[name]:
            inputs, made = shapes_of((call_args or tuple(call_kwargs.values()), output))
            stack_path = next((each for each in above_path(path) if leads.get(each)), None)
            calls[name][path] = Call(module, inputs, made, leads[path], stack_path)
        return output

    def run(params: Variables, *args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(_once_per_call(record, {"__call__", *at})):
            return linen.apply(params, *args, **kwargs)

    over_shapes(run, params, args, kwargs)
    return calls


def over_shapes(call: Callable[..., Any], params: Variables, args: tuple, kwargs: dict) -> None:
    """`call(params, *args, **kwargs)` on shapes alone, for what it does beside computing."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")}

    def run(params: Variables, arrays: dict[int, Any]) -> Any:
        # Flags and names stay what they are: a tracer in their place would break the model's own `if`s.
        filled = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        run_args, run_kwargs = jax.tree.unflatten(structure, filled)
        return call(params, *run_args, **run_kwargs)

    jax.eval_shape(run, params, arrays)


def init_site(
    method: SiteMethod, name: str, rng: jax.Array, path: str, call: Call, hit: Hit, params: Variables
) -> tuple[Variables, Variables]:
    """Trained and untrained variables at one site, for the layers that `hit` names.

    A layer's numbers depend on `rng` and on the layer, and not on whether layers are scanned.
    """
    if hit.rows is not None and not call.lead:
        raise InputError(f"{path}: the address has a layer range, but no layers are stacked here")
    own = own_params(node_at(params, path))
    if not method.reads:  # shapes do, and slices of large arrays need not be made
        own = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[len(call.lead) :], leaf.dtype), own)

    def one(key: jax.Array, layer: Variables) -> tuple[Variables, Variables]:
        site, (first, second) = Site(path, call.module, layer), jax.random.split(key)
        trained = method.init(first, site, call.args, call.output)
        state = method.state(second, site, call.args, call.output, trained)
        # Copies: what is trained may be donated, also where the state keeps its initial value.
        return trained, jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)

    if not call.lead:
        return one(_keys(rng, [f"{path}/{name}"])[0], own)
    rows = np.arange(call.lead[0]) if hit.rows is None else np.asarray(hit.rows)
    keys = _keys(rng, [f"{each}/{name}" for each in _layer_paths(path, call, rows, params)])

    def each(key: jax.Array, layer: Variables, sizes: tuple[int, ...]) -> tuple[Variables, Variables]:
        if not sizes:
            return one(key, layer if method.reads else own)
        return jax.vmap(partial(each, sizes=sizes[1:]))(jax.random.split(key, sizes[0]), layer)

    layers = jax.tree.map(lambda leaf: leaf[rows], own) if method.reads else {}
    return jax.vmap(partial(each, sizes=call.lead[1:]))(keys, layers)


def apply_sites(
    model: Any,
    params: Mapping[str, Any],
    methods: Mapping[str, SiteMethod],
    expected: Iterable[Place],
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """`model.apply(params, *args, **kwargs)` with the deltas in `params` under the names of `methods`.

    Raises `InputError` if one of the `expected` places is never called: its delta would be ignored.
    """
    if isinstance(model, SiteModel):
        return model.apply_sites(params, methods, expected, args, kwargs)
    calls: Counter[Place] = Counter()
    rng: Any = kwargs.get("rng")
    train = bool(kwargs.get("train", False))

    def adapt(module: nn.Module, at: str, call: Callable, call_args: tuple, call_kwargs: dict) -> Any:
        scope, path = module.scope, path_of(module)
        assert scope is not None
        for name, method in methods.items():
            if method.at == at and scope.has_variable("params", name):
                calls[path, name] += 1
                draws = train and method.random and rng is not None
                key = jax.random.fold_in(rng, calls[path, name]) if draws else None
                site = Site(path, module, own_params(scope.variables().get("params")), key, train)
                call = partial(_adapted, method, scope.get_variable("params", name), site, call)
        return call(*call_args, **call_kwargs)

    with nn.intercept_methods(_once_per_call(adapt, {method.at for method in methods.values()})):
        outputs = model.apply(params, *args, **kwargs)
    if unused := [path for path, name in expected if (path, name) not in calls]:
        raise InputError(f"{unused[0]}: the model did not call this module, so its delta would be ignored")
    return outputs


def spread(variables: Variables, hit: Hit, neutral: float) -> Variables:
    """Variables of some rows as variables of all `hit.total`; the other layers get what changes nothing."""
    if hit.rows is None:
        return variables
    rows = np.asarray(hit.rows)

    def fill(leaf: jax.Array) -> jax.Array:
        return jnp.full((hit.total, *leaf.shape[1:]), neutral, leaf.dtype).at[rows].set(leaf)

    return jax.tree.map(fill, variables)


@contextmanager
def changed_output(module: Any, path: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """For a while, the first call of the module at `path` below `module`, which is running, is `change`d."""
    if not isinstance(module, nn.Module):
        from .nnx_hooks import changed_output as in_nnx

        with in_nnx(module, path, change):
            yield
        return
    whole = "/".join(part for part in (path_of(module), path) if part)
    done: list[bool] = []

    def intercept(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        output = call(*args, **kwargs)
        if context.method_name != "__call__" or path_of(context.module) != whole or done:
            return output
        done.append(True)
        return change(output)

    with nn.intercept_methods(intercept):
        yield


def path_of(module: nn.Module) -> str:
    """The `/` path of a module in a running model; empty for the root."""
    return "/".join(module.scope.path) if module.scope is not None else ""


def _adapted(
    method: SiteMethod, variables: Variables, site: Site, call: Callable, *args: Any, **kwargs: Any
) -> Any:
    return method.apply(variables, site, call, args, kwargs)


def _once_per_call(act: Callable, at: set[str]) -> Callable:
    """An interceptor for the methods in `at`; `super().__call__` inside one is part of the same call."""
    active: set[tuple] = set()

    def intercept(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module, name = context.module, context.method_name
        key = (module.scope.path, name) if module.scope is not None else None
        if key is None or name not in at or key in active:
            return call(*args, **kwargs)
        active.add(key)
        try:
            return act(module, name, call, args, kwargs)
        finally:
            active.discard(key)

    return intercept


def shapes_of(tree: Any) -> Any:
    """Arrays as shapes and dtypes, so that no tracer outlives its trace."""

    def shape(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "aval") else leaf

    return jax.tree.map(shape, tree)


def _lead(module: nn.Module, params: Variables, leads: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The axes that lifted transformations took off the parameters which `module` sees.

    Read from the scope that the innermost transformation opened: it holds parameters even where the
    module itself, a hook, has none.
    """
    assert module.scope is not None
    opened = module.scope.root
    return leading_axes("/".join(opened.path), opened.variables().get("params", {}), params, leads)


def leading_axes(
    path: str, seen: Mapping[str, Any], params: Variables, leads: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...]:
    """The axes that `params` has in front of what was `seen` of them at `path`, or nearest above it.

    Raises `InputError` where layers are stacked along another axis than the first.
    """
    inner, whole = flatten_dict(dict(seen)), flatten_dict(dict(node_at(params, path) or {}))
    shared = [keys for keys in inner if keys in whole]
    if not shared:
        return next((leads[each] for each in reversed(above_path(path)) if each in leads), ())
    one, full = inner[shared[0]].shape, whole[shared[0]].shape
    count = len(full) - len(one)
    if full[count:] != one:
        raise InputError(f"{path}: layers are stacked as {full} from {one}; only a leading axis is supported")
    return full[:count]


def _layer_paths(path: str, call: Call, rows: np.ndarray, params: Variables) -> list[str]:
    """What `path` would be called in each of these rows, were the layers not stacked."""
    assert call.stack is not None
    period, rest = stack(params, call.stack)[1], path[len(call.stack) :]
    slot = re.match(r"/layer_(\d+)(?=/|$)", rest) if period > 1 else None
    tail = rest[slot.end() :] if slot else rest
    return [f"{call.stack}_{row * period + int(slot[1] if slot else 0)}{tail}" for row in rows]


def _keys(rng: jax.Array, paths: list[str]) -> jax.Array:
    hashes = np.array([zlib.crc32(path.encode()) for path in paths], np.uint32)
    return jax.vmap(partial(jax.random.fold_in, rng))(hashes)
