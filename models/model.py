"""What the rest of the library asks of a model: a pair of pure functions.

`init` makes a bare nested dictionary of arrays, `apply` computes with it. Our Transformers, any Linen
module (through `LinenModel`) and forty lines of plain JAX satisfy it alike.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
from flax.errors import ScopeCollectionNotFound

from .. import InputError

Params = Mapping[str, Any]


@runtime_checkable
class Model(Protocol):
    """A model as two pure functions."""

    def init(self, rng: jax.Array, *args: Any, **kwargs: Any) -> Params:
        """Parameters for inputs shaped like `args`."""

    def apply(
        self, params: Params, *args: Any, rng: jax.Array | None = None, train: bool = False, **kwargs: Any
    ) -> Any:
        """Outputs; `rng` feeds dropout where `train`."""


@dataclass(frozen=True)
class LinenModel:
    """Any Flax Linen module with only a `params` collection, as a `Model`."""

    module: nn.Module

    def init(self, rng: jax.Array, *args: Any, **kwargs: Any) -> Params:
        """The module's `params` collection; raises `InputError` for a module that has another."""
        collections = dict(self.module.init({"params": rng}, *args, **kwargs))
        params = collections.pop("params", {})
        if collections:
            raise InputError(
                f"{type(self.module).__name__} keeps a collection {min(collections)!r} beside its params; "
                f"a model here is a function of its parameters alone"
            )
        return params

    def apply(
        self,
        params: Params,
        *args: Any,
        rng: jax.Array | None = None,
        train: bool = False,
        mutable: Any = False,
        kept: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Outputs, and the collections named by `mutable` where that is asked for.

        `train` reaches the module if its `__call__` takes an argument of that name. `kept` are collections
        beside the parameters, such as a cache. Raises `InputError` for one that the module misses.
        """
        if "train" in inspect.signature(type(self.module).__call__).parameters:
            kwargs["train"] = train
        rngs = None if rng is None else {"dropout": rng}
        collections = {**(kept or {}), "params": params}
        try:
            return self.module.apply(collections, *args, rngs=rngs, mutable=mutable, **kwargs)
        except ScopeCollectionNotFound as error:
            missing = re.search(r'collection "(\w+)"', str(error))
            if missing is None or missing[1] in collections:
                raise
            raise InputError(
                f"{type(self.module).__name__} keeps a collection {missing[1]!r} beside its params; "
                f"a model here is a function of its parameters alone"
            ) from None


def as_model(model: Model | nn.Module) -> Model:
    """`model`, or a Linen module wrapped in `LinenModel`."""
    if isinstance(model, nn.Module):
        return LinenModel(model)
    if not isinstance(model, Model):
        raise InputError(f"a model needs init and apply; {type(model).__name__} has not both")
    return model


def as_linen(model: Model | nn.Module) -> LinenModel:
    """`model` as a `LinenModel`; raises `InputError` for one that no Linen module stands behind."""
    candidate = as_model(model)
    if not isinstance(candidate, LinenModel):
        raise InputError(f"{type(candidate).__name__} is not a Linen model: its sites cannot be intercepted")
    return candidate
