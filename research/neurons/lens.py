"""What a model would say after each layer, and whom its heads look at.

The logit lens (nostalgebraist, 2020) reads the residual stream after each layer with the model's own final
norm and head. Here it is a patch: the last layer's output is replaced by an earlier one's, and the model goes
on from there, so it needs to know nothing of heads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ...models.attention import AttentionModule
from ...models.hooks import Given, collect, matches, run_with_cache, run_with_edits, site_shapes
from ...models.kernels import attention_probabilities
from ...models.model import Model, Params
from .layers import Layers

logger = logging.getLogger(__name__)


def logit_lens(
    model: Model | nn.Module, params: Params, *args: Any, name: str = "residual", **kwargs: Any
) -> Any:
    """The model's outputs as if it ended after layer 0, 1, ..., with a leading axis L; the last are its own.

    `name` are the sites of the residual stream in one stack of layers (of an encoder-decoder
    `decoder/.*residual`).
    """
    layers = Layers.of(site_shapes(model, params, *args, names=[name], **kwargs))
    stream = layers.join(run_with_cache(model, params, *args, names=[name], **kwargs)[1])
    last = jnp.arange(len(layers)) == len(layers) - 1

    def one(hidden: jax.Array) -> Any:
        rows = jnp.broadcast_to(hidden, (len(layers), *hidden.shape))
        edit = Given(_replaced, layers.split((last, rows)))
        return run_with_edits(model, params, *args, edits={name: edit}, **kwargs)

    return jax.vmap(one)(stream)


def attention_maps(
    model: Model | nn.Module, params: Params, *args: Any, name: str = "attention", **kwargs: Any
) -> tuple[Any, dict[str, jax.Array]]:
    """The outputs, and by path of an attention layer its weights `[B, H, T, S]`; rows sum to 1, or 0.

    The weights are computed by the reference, whatever kernel computes the layer's output: kernels do not
    make this matrix. It is logged that they are, at trace time. Under scanned layers the maps are stacked
    `[L, ...]`.
    """

    def read(context: Any, call: Callable[..., Any], given: tuple, more: dict[str, Any]) -> tuple[Any, Any]:
        module, output = context.module, call(*given, **more)
        path = "/".join(module.scope.path) if module.scope is not None else ""
        called = isinstance(module, AttentionModule) and context.method_name == "attend"
        if not (called and matches(name, path)):
            return output, None
        logger.info("%s: attention weights by the reference implementation", path)
        return output, _weights(module, *given[:2], *given[3:5], **more)

    return collect(model, params, *args, read=read, **kwargs)


def _weights(module: AttentionModule, query: Any, key: Any, mask: Any, bias: Any, **more: Any) -> jax.Array:
    choice = module.choice
    return attention_probabilities(
        query,
        jnp.asarray(key),
        mask=mask,
        bias=bias,
        scale=choice.scale or None,
        soft_cap=choice.soft_cap or None,
    )


def _replaced(x: jax.Array, given: tuple[jax.Array, jax.Array]) -> jax.Array:
    here, value = given
    return jnp.where(here, value, x)
