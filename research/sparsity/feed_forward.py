"""The feed-forward layers of a Transformer, taken out of it: weights neuron by neuron, and what they read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from ... import InputError
from ...models.config import TransformerConfig
from ...models.kernels.sparse import Experts
from ...models.mlp import DRELU, MLP, GatedMLP
from ...models.model import Params
from ...models.stacking import unstack_layers
from ...models.transformer import Transformer
from .statistics import Batch, Real, real_tokens, transformer_inputs

LAYER = re.compile(r"(?:.*/)?layers_(\d+)/mlp")
SEED = 0  # of which tokens are kept


@dataclass(frozen=True)
class Layers:
    """A Transformer with unrolled layers, its parameters, and its feed-forward layers by path.

    `dense["layers_3/mlp"]` has an expert for each neuron: `[F, 1, D]`.
    """

    model: Transformer
    params: Params
    dense: Mapping[str, Experts]

    @classmethod
    def of(cls, model: Transformer, params: Params) -> Layers:
        """Those of `model`; raises `InputError` where a layer's feed-forward part is of another kind."""
        config = model.config
        if config.scan:
            params = unstack_layers(params, config.period)
        model = replace(model, config=replace(config, scan=False, remat="none"))
        paths = {
            path.rpartition("/mlp/")[0] + "/mlp" for path in flatten_dict(params, sep="/") if "/mlp/" in path
        }
        named = sorted((path for path in paths if LAYER.fullmatch(path)), key=_order)
        if not named:
            raise InputError("the model has no feed-forward layers")
        return cls(model, params, {path: _dense(config, path, subtree(params, path)) for path in named})


def subtree(params: Params, path: str) -> Params:
    """The part of the tree at a `/` path."""
    for name in path.split("/"):
        params = params[name]
    return params


def layer_number(path: str) -> int:
    """The i of `layers_i/mlp`."""
    found = LAYER.fullmatch(path)
    assert found is not None
    return int(found[1])


def regrouped(dense: Experts, groups: np.ndarray) -> Experts:
    """The neurons of `dense [F, 1, D]` in experts: `groups [E, n]` are neurons' numbers, each once."""
    width = dense.count
    if sorted(groups.ravel().tolist()) != list(range(width)):
        raise InputError(f"groups {list(groups.shape)} do not have each of {width} neurons once")
    moved = jax.tree.map(lambda leaf: leaf[:, 0][groups], dense.without_output_bias())
    return replace(moved, down_bias=dense.down_bias)


def elementwise(choice: MLP | GatedMLP) -> str:
    """The name of the layer's activation function; raises `InputError` for those that experts cannot have."""
    found = choice.activation
    if not isinstance(found, str) or found == DRELU:
        raise InputError(
            f"mlp activation {found!r} cannot be cut into experts; a named function of one product can"
        )
    return found


def input_weights(dense: Experts) -> np.ndarray:
    """The weights `[F, D]` that decide whether a neuron is active: of the gate, where there is one."""
    return np.asarray(dense.up if dense.gate is None else dense.gate, np.float32)[:, 0]


def capture_inputs(
    layers: Layers, batches: Iterable[Batch], tokens: int, real: Real | None = None
) -> dict[str, np.ndarray]:
    """What each feed-forward layer reads on `tokens` tokens, drawn evenly from all real ones: `[N, D]` each.

    Fewer where there are fewer. Raises `InputError` where there is no batch.
    """
    read = reader(layers)
    kept: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    draws = {path: np.random.default_rng(SEED) for path in layers.dense}
    for batch in batches:
        for path, value in read(layers.params, dict(batch)).items():
            mask = np.asarray((real or real_tokens)(batch, path))
            if mask.shape != value.shape[:2]:  # one token of each row is read
                mask = np.asarray(mask.any(-1, keepdims=True))
            found = np.asarray(value, np.float32)[np.broadcast_to(mask, value.shape[:2])]
            order, old = draws[path].random(len(found)), kept.get(path)
            if old is not None:
                order, found = np.concatenate([old[0], order]), np.concatenate([old[1], found])
            best = np.argsort(order, kind="stable")[:tokens]
            kept[path] = order[best], found[best]
    if not kept:
        raise InputError("no batches to read a feed-forward layer's inputs from")
    return {path: kept[path][1] for path in layers.dense}


def reader(layers: Layers) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """A compiled function of parameters and a batch: the inputs `[B, T, D]` of each feed-forward layer."""
    wanted = set(layers.dense)

    @jax.jit
    def read(params: Params, batch: Batch) -> dict[str, jax.Array]:
        found: dict[str, jax.Array] = {}

        def see(next_call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
            path = "/".join(context.module.path)
            if context.method_name == "__call__" and path in wanted:
                found[path] = args[0]
            return next_call(*args, **kwargs)

        args, kwargs = transformer_inputs(batch)
        with nn.intercept_methods(see):
            layers.model.apply(params, *args, **kwargs)
        return found

    return read


def _order(path: str) -> tuple[str, int]:
    return path.rpartition("layers_")[0], layer_number(path)


def _dense(config: TransformerConfig, path: str, params: Params) -> Experts:
    choice = config.layer(layer_number(path))[1]
    if not isinstance(choice, MLP | GatedMLP):
        raise InputError(f"{path} is a {type(choice).__name__}; an MLP or a GatedMLP is valid")
    width, neurons = config.width, choice.width or 4 * config.width
    scale = {"up": width**-0.5, "gate": width**-0.5, "down": neurons**-0.5} if config.scaled_linears else {}

    def rows(name: str) -> jax.Array:
        kernel = jnp.asarray(params[name]["kernel"]) * scale.get(name, 1.0)
        return (kernel if name == "down" else kernel.T)[:, None]

    def bias(name: str) -> jax.Array | None:
        return jnp.asarray(params[name]["bias"])[:, None] if choice.bias else None

    gated = isinstance(choice, GatedMLP)
    return Experts(
        up=rows("up"),
        down=rows("down"),
        gate=rows("gate") if gated else None,
        up_bias=bias("up"),
        gate_bias=bias("gate") if gated else None,
        down_bias=jnp.asarray(params["down"]["bias"]) if choice.bias else None,
        activation=elementwise(choice),
    )
