"""Deltas on Flax NNX models: the same methods, addresses and files as on Linen models.

    tuned, params = attach_nnx(model, {"layers/attention/(query|value)": LoRA(rank=8)})
    variables = tuned.init(rng, params, x)
    y = tuned.apply(variables, params, x)                  # differentiable, functional, as for Linen
    merged = tuned.model.module(tuned.merge(params, variables))    # an NNX module again

NNX has no interceptors. Each call makes a copy of the model whose modules at the addresses have a subclass
of their class that knows of the delta, and the delta's arrays as parameters of their own, so that `nnx.scan`
and `nnx.vmap` slice them as they slice the module's. The user's model is not touched, and paths of its
parameters stay what they were.
"""

from __future__ import annotations

import functools
import inspect
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ... import InputError
from .addresses import above_path
from .attach import Spec, Tuned, attach
from .methods import Method, Site, SiteMethod, Variables
from .nnx_hooks import Keys, hook, joined, modules
from .sites import Call, leading_axes, over_shapes, shapes_of
from .trees import Place, Tree

_called: ContextVar[set[Place]] = ContextVar("_called")


def attach_nnx(
    module: Any, spec: Spec | Method, *, exclude: Iterable[str] = ()
) -> tuple[Tuned, dict[str, Any]]:
    """The tuned model and the backbone's parameters, a nested dictionary by the names of attributes.

    `spec` and `exclude` are those of `attach`; entries of lists have their numbers as names, so layers
    are `layers/{0-3}/...`. Raises `InputError` for a model with state beside parameters and random streams.
    """
    model, params = nnx_model(module)
    return attach(model, spec, exclude=exclude), params


def nnx_model(module: Any) -> tuple[NNXModel, dict[str, Any]]:
    """An NNX module as a pair of a functional model and its parameters.

    `load_delta` takes the first as its model. Raises `InputError` as `attach_nnx`.
    """
    from flax import nnx

    if not isinstance(module, nnx.Module):
        raise InputError(f"attach_nnx takes an NNX module; {type(module).__name__} is none")
    parts: Any = nnx.split(module, nnx.Param, ...)
    graphdef, trained, rest = parts
    for keys, variable in nnx.to_flat_state(rest):
        if not isinstance(variable, nnx.RngState):
            raise InputError(
                f"{type(module).__name__} keeps {type(variable).__name__} at {joined(keys)!r} beside its "
                f"parameters; a model here is a function of its parameters alone"
            )
    flat = {_names(keys): variable.get_value() for keys, variable in nnx.to_flat_state(trained)}
    template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), trained)
    return NNXModel(graphdef, template, rest), unflatten_dict(flat)


@dataclass(frozen=True, eq=False)
class NNXModel:
    """An NNX module as a function of its parameters: its structure, their shapes and its random streams.

    `train` switches between `train()` and `eval()` of its modules, and there `rng` feeds its streams.
    """

    graphdef: Any
    template: Any
    rest: Any

    def init(self, rng: jax.Array, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """Not defined: an NNX module comes with its parameters."""
        raise InputError("an NNX model has no init; nnx_model(module) returns its parameters")

    def apply(
        self,
        params: Mapping[str, Any],
        *args: Any,
        rng: jax.Array | None = None,
        train: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The module's outputs with these parameters."""
        return self._run(self.module(params), args, kwargs, rng, train)

    def module(self, params: Mapping[str, Any]) -> Any:
        """A new NNX module with these parameters; raises `InputError` for one that is missing."""
        from flax import nnx

        flat, filled = flatten_dict(dict(params)), []
        for keys, variable in nnx.to_flat_state(self.template):
            if _names(keys) not in flat:
                raise InputError(f"{joined(keys)}: the NNX model has this parameter, but params has not")
            filled.append((keys, variable.replace(flat[_names(keys)])))
        # Without a copy, gradients through a scan inside the module fail in flax 0.12.8.
        return nnx.merge(self.graphdef, nnx.from_flat_state(filled), self.rest, copy=True)

    def find_calls(
        self, params: Variables, args: tuple, kwargs: dict, at: set[str]
    ) -> dict[str, dict[str, Call]]:
        """The calls that modules make, as `sites.find_calls`."""
        by_path = {joined(keys): module for keys, module in modules(self.module(_abstract(params)))}
        recorder = _Recorder(params, at, by_path)

        def run(params: Variables, *args: Any, **kwargs: Any) -> Any:
            module = self.module(params)
            for keys, each in list(modules(module)):
                hook(each, _Recording(joined(keys), recorder), {"__call__", *at})
            return self._run(module, args, kwargs)

        over_shapes(run, params, args, kwargs)
        return recorder.calls

    def apply_sites(
        self,
        params: Mapping[str, Any],
        methods: Mapping[str, SiteMethod],
        expected: Iterable[Place],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Any:
        """Outputs with the deltas in `params`, as `sites.apply_sites`."""
        kwargs = dict(kwargs)
        rng, train = kwargs.pop("rng", None), bool(kwargs.pop("train", False))
        module, deltas = self.module(params), _deltas(params)
        for keys, each in list(modules(module)):
            if own := deltas.get(path := joined(keys)):
                used = tuple((name, method) for name, method in methods.items() if name in own)
                draws = _Draws(rng) if train and rng is not None and any(m.random for _, m in used) else None
                hook(each, _Adapting(path, used, train, draws), {method.at for _, method in used})
                for name, _ in used:
                    setattr(each, name, _delta_param()(own[name]))
        token = _called.set(set())
        try:
            outputs = self._run(module, args, kwargs, rng, train)
            unused = [place for place in expected if place not in _called.get()]
        finally:
            _called.reset(token)
        if unused:  # or a program inside the model was compiled before, so that nothing was called
            self._require_calls(unused, params, methods, args, kwargs)
        return outputs

    def _require_calls(
        self,
        places: list[Place],
        params: Mapping[str, Any],
        methods: Mapping[str, SiteMethod],
        args: tuple,
        kwargs: dict,
    ) -> None:
        calls = self.find_calls(params, args, kwargs, {method.at for method in methods.values()})
        for path, name in places:
            if path not in calls[methods[name].at]:
                raise InputError(f"{path}: the model did not call this module, so its delta would be ignored")

    def _run(
        self, module: Any, args: tuple, kwargs: dict, rng: jax.Array | None = None, train: bool = False
    ) -> Any:
        if train:
            module.train()
            _seed(module, rng)
        else:
            module.eval()
        if "train" in inspect.signature(type(module).__call__).parameters:
            kwargs = {**kwargs, "train": train}
        return module(*args, **kwargs)


class _Draws:
    """A random key for one pass; equal to no other, so that no compiled program keeps it."""

    def __init__(self, rng: jax.Array) -> None:
        self.rng, self.calls = rng, Counter[Place]()

    def key(self, place: Place) -> jax.Array:
        self.calls[place] += 1
        return jax.random.fold_in(self.rng, self.calls[place])


@dataclass(frozen=True)
class _Adapting:
    """What a module with deltas does; equal ones make equal graph definitions, so programs are found."""

    path: str
    methods: tuple[tuple[str, SiteMethod], ...]
    train: bool
    draws: _Draws | None

    def __call__(self, module: Any, at: str, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        for name, method in self.methods:
            if method.at == at:
                place = self.path, name
                if (called := _called.get(None)) is not None:
                    called.add(place)
                key = self.draws.key(place) if self.draws is not None and method.random else None
                site = Site(self.path, module, _parameters(module), key, self.train)
                call = functools.partial(_adapted, method, getattr(module, name).get_value(), site, call)
        return call(*args, **kwargs)


@dataclass(eq=False)
class _Recorder:
    """Collects the first call of each module, by method and path."""

    params: Variables
    at: set[str]
    modules: Mapping[str, Any]
    leads: dict[str, tuple[int, ...]] = field(default_factory=dict)
    calls: dict[str, dict[str, Call]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.params = _abstract(self.params)
        self.calls.update({name: {} for name in self.at})


@dataclass(frozen=True)
class _Recording:
    """What a module does while calls are recorded."""

    path: str
    recorder: _Recorder

    def __call__(self, module: Any, at: str, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        path, recorder = self.path, self.recorder
        leads = recorder.leads
        leads.setdefault(path, leading_axes(path, _parameters(module), recorder.params, leads))
        output = call(*args, **kwargs)
        if at in recorder.at and path not in recorder.calls[at]:
            inputs, made = shapes_of((args or tuple(kwargs.values()), output))
            stack = next((each for each in above_path(path) if leads.get(each)), None)
            recorder.calls[at][path] = Call(recorder.modules[path], inputs, made, leads[path], stack)
        return output


def _adapted(
    method: SiteMethod, variables: Variables, site: Site, call: Callable, *args: Any, **kwargs: Any
) -> Any:
    return method.apply(variables, site, call, args, kwargs)


@functools.cache
def _delta_param() -> type:
    """The type of a delta's variables: parameters, to be sliced wherever parameters are."""
    from flax import nnx

    class DeltaParam(nnx.Param):
        pass

    return DeltaParam


def _parameters(module: Any) -> Tree:
    """A module's parameters as it sees them, one layer's inside a scan; without deltas."""
    from flax import nnx

    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return unflatten_dict(
        {
            tuple(map(str, keys)): variable.get_value()
            for keys, variable in flat
            if not isinstance(variable, _delta_param())
        }
    )


def _deltas(params: Mapping[str, Any]) -> dict[str, Tree]:
    """The deltas among parameters: variables by name, by the path of their module."""
    found: dict[str, Tree] = {}

    def walk(node: Mapping[str, Any], path: str) -> None:
        for name, below in node.items():
            if name.startswith("~"):
                found.setdefault(path, {})[name] = dict(below)
            elif isinstance(below, Mapping):
                walk(below, f"{path}/{name}".strip("/"))

    walk(params, "")
    return found


def _seed(module: Any, rng: jax.Array | None) -> None:
    """Keys of the module's random streams drawn from `rng`, each its own."""
    from flax import nnx

    for keys, variable in nnx.to_flat_state(nnx.state(module, nnx.RngState)):
        if rng is None:
            raise InputError(f"the NNX model draws at random at {joined(keys)}: train=True needs rng=")
        old = variable.get_value()
        if isinstance(variable, nnx.RngKey):
            key = jax.random.fold_in(rng, np.uint32(zlib.crc32(joined(keys).encode())))
            new = key if old.shape == () else jax.random.split(key, old.shape)
        else:
            new = jnp.zeros_like(old)
        variable.set_value(new)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _names(keys: Keys) -> tuple[str, ...]:
    """The path of a parameter by names; raises `InputError` for one that an address could not say."""
    names = tuple(map(str, keys))
    if any("/" in name or name.startswith("~") for name in names):
        raise InputError(f"NNX parameter {joined(keys)}: a name with '/' or a leading '~' has no address")
    return names
