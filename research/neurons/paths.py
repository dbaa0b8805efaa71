"""Effects along the residual stream alone: what a unit adds to the logits itself, and to which later part.

Layers read one stream and add to it. Where what they read is held, a change of one activation goes straight
on to the end (direct logit attribution: Elhage et al., "A Mathematical Framework for Transformer Circuits",
2021) or straight into one later part (path patching: Wang et al., "Interpretability in the Wild", 2022;
Goldowsky-Dill et al., "Localizing Model Behavior with Path Patching", 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ... import InputError
from ...models.config import TransformerConfig
from ...models.hooks import Given, matches, run_with_cache, run_with_edits
from ...models.model import Model, Params, as_linen
from ...models.norms import LayerNormModule, RMSNormModule
from ...models.precision import promote_statistics
from .interventions import for_each, single_site
from .patching import activation_gradients, patched, require_alike

SUBLAYERS = "(attention|cross_attention|mlp)"


def direct_effects(
    model: Model | nn.Module,
    params: Params,
    *args: Any,
    names: Sequence[str],
    metric: Callable[[Any], jax.Array],
    **kwargs: Any,
) -> dict[str, jax.Array]:
    """By site path what each activation adds to the scalar `metric(outputs)` itself, by no later layer.

    An activation times the metric's gradient by it along the stream, whose norms (the final one; after layers
    too where these are normalised afterwards) divide by what they divide by in this run. For a metric that
    is linear in the logits, such as a difference of two, the effects of `embedded`, `attention` and `mlp` add
    up to it, but for the biases of norms and head; those of `mlp/act` (`mlp/mid`) are each neuron's, of
    `attention/heads` each head's. Through a head with an activation of its own (a masked language model's, a
    pooler) they are to first order. All sites at once, with one backward pass. For our Transformers; raises
    `InputError` for other models.
    """
    _require_stream(model)
    found = run_with_cache(model, params, *args, names=names, **kwargs)[1]
    with nn.intercept_methods(_straight):
        slopes = activation_gradients(model, params, *args, names=names, metric=metric, **kwargs)
    return {path: found[path] * slopes[path] for path in found}


def patch_paths(
    model: Model | nn.Module,
    params: Params,
    clean: Any,
    corrupted: Any,
    *,
    sender: str,
    receivers: Sequence[str],
    metric: Callable[[Any], Any],
    axis: int,
    chunk: int = 64,
    **kwargs: Any,
) -> Any:
    """`metric` of the run on `corrupted` where `receivers` see one unit of `sender` as on `clean`.

    As `patch_each`, but the unit's new value reaches the sites `receivers` alone, and them by the stream and
    not by layers between: their values come from a run in which every other attention and feed-forward layer
    puts out what it did on `corrupted`. A later layer's `attention/query` says what its queries make of the
    unit; `final_norm` is the way straight to the logits. For unrolled models. Raises `InputError` for a
    receiver that is the output of such a layer, which the unit cannot change.
    """
    require_alike(clean, corrupted)
    _require_stream(model)
    path, shape = single_site(model, params, clean, name=sender, **kwargs)
    source = run_with_cache(model, params, clean, names=[path], **kwargs)[1][path]
    held = _others(model, params, corrupted, path, **kwargs)
    if deaf := [other for other in held if any(matches(name, other) for name in receivers)]:
        raise InputError(
            f"receiver {deaf[0]!r} is what a layer puts out, which is held; name what in it reads, "
            f"such as 'attention/query' or 'mlp/up', or 'final_norm'"
        )

    def one(unit: jax.Array) -> Any:
        edit = partial(patched, source=source, unit=unit, axis=axis)
        edits: dict[str, Any] = {".*": Given(_held, held), path: edit}
        seen = run_with_cache(model, params, corrupted, names=receivers, edits=edits, **kwargs)[1]
        return metric(run_with_edits(model, params, corrupted, edits={".*": Given(_held, seen)}, **kwargs))

    return for_each(one, jnp.arange(shape[axis]), chunk=chunk)


def _others(
    model: Model | nn.Module, params: Params, tokens: Any, sender: str, **kwargs: Any
) -> dict[str, Any]:
    """What every attention and feed-forward layer but the sender's own puts out."""

    def kept(path: str, value: Any) -> Any:
        return None if f"{sender}/".startswith(f"{path}/") else value

    return run_with_cache(model, params, tokens, names=[SUBLAYERS], reduce=kept, **kwargs)[1]


def _straight(next_call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    """Layers read the stream as if it were given, and norms divide it as if by given numbers."""
    module = context.module
    path = "" if module.scope is None else "/".join(module.scope.path)
    if context.method_name != "__call__" or not matches(f"({SUBLAYERS}(_norm)?|final_norm)", path):
        return next_call(*args, **kwargs)
    if isinstance(module, LayerNormModule | RMSNormModule):
        straight = _with_given_size(module, *args)  # the call is made too: edits and deltas act on it
        return next_call(*lax.stop_gradient(args), **kwargs) + straight - lax.stop_gradient(straight)
    if kwargs.get("memory") is not None:
        kwargs = {**kwargs, "memory": lax.stop_gradient(kwargs["memory"])}
    return next_call(*lax.stop_gradient(args), **kwargs)


def _with_given_size(module: LayerNormModule | RMSNormModule, x: jax.Array) -> jax.Array:
    """The norm of `x`, whose gradient takes what it is divided by for a constant."""
    wide, own = promote_statistics(x), module.variables["params"]
    centred = wide - wide.mean(-1, keepdims=True) if isinstance(module, LayerNormModule) else wide
    square = lax.stop_gradient(jnp.square(centred).mean(-1, keepdims=True))
    y = centred * lax.rsqrt(square + module.choice.epsilon) * own["scale"]
    return (y + own.get("bias", 0)).astype(x.dtype)


def _require_stream(model: Model | nn.Module) -> None:
    module = as_linen(model).module
    if not isinstance(getattr(module, "config", None), TransformerConfig):
        raise InputError(
            f"{type(module).__name__} is not a Transformer of ours: which of its parts read a stream that "
            f"others add to is not known"
        )


def _held(x: jax.Array, value: jax.Array) -> jax.Array:
    return value
