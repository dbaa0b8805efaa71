"""A model with only its skill neurons: the others are held at their means, which become a bias.

`down(a) = a_kept W_kept + a_removed W_removed + b`: with every removed neuron at its mean m, the second
product is a constant that is added to the bias b, and the layer is as narrow as what is kept. Only the means
of what is *removed* go there (the public implementation of Wang et al., 2022, adds those of all neurons, and
so counts the kept ones twice).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from ... import InputError
from ...models.config import Layer, TransformerConfig
from ...models.mlp import MLP, GatedMLP
from ...models.model import Params
from ...models.transformer import Transformer


def neuron_site(config: TransformerConfig) -> str:
    """The hook at which a layer's neurons are what its last product reads: `mlp/act`, gated `mlp/mid`."""
    gated = {isinstance(config.layer(index)[1], GatedMLP) for index in range(config.period)}
    if len(gated) != 1:
        raise InputError("some layers are gated and some are not: their neurons are at no one site")
    return "mlp/mid" if gated.pop() else "mlp/act"


def prune(
    model: Transformer, params: Params, keep: np.ndarray, means: np.ndarray
) -> tuple[Transformer, dict[str, Any]]:
    """The model with the neurons of `keep [L, F]` alone; the others are fixed at `means [L, F]`.

    It is a model of its own, with layers of their own widths, and computes what `fixed(~keep, means)` does.
    Layers in which all neurons are kept stay as they are. Raises `InputError` for scanned layers, an
    encoder-decoder, layers that are not plain or gated, masks of another shape and an empty layer.
    """
    config = model.config
    keep, means = np.asarray(keep, bool), np.asarray(means)
    _require_prunable(config, keep, means)
    pattern, pruned = [], dict(params)
    for index in range(config.layers):
        attention, mlp = config.layer(index)
        own = config.pattern[index % config.period] if config.pattern else Layer()
        if keep[index].all() or config.lacks(index, "mlp"):
            pattern.append(replace(own, attention=attention, mlp=mlp))
            continue
        assert isinstance(mlp, MLP | GatedMLP)
        narrow = replace(mlp, width=int(keep[index].sum()), bias=True)
        pattern.append(replace(own, attention=attention, mlp=narrow))
        layer = params[f"layers_{index}"]
        narrowed = _narrowed(layer["mlp"], keep[index], means[index], config.scaled_linears)
        pruned[f"layers_{index}"] = {**layer, "mlp": narrowed}
    return Transformer(replace(config, pattern=tuple(pattern)), model.head), pruned


def _narrowed(mlp: Mapping[str, Any], keep: np.ndarray, means: np.ndarray, scaled: bool) -> dict[str, Any]:
    """The parameters of one feed-forward layer with fewer neurons.

    `scaled` products are divided by the square root of their input's width, of which there is less now.
    """
    rows = np.flatnonzero(keep)
    result = {}
    for name in ("gate", "up"):
        if name in mlp:
            kernel = jnp.asarray(mlp[name]["kernel"])[:, rows]
            bias = mlp[name].get("bias", jnp.zeros(keep.shape, kernel.dtype))
            result[name] = {"kernel": kernel, "bias": jnp.asarray(bias)[rows]}
    kernel = jnp.asarray(mlp["down"]["kernel"])
    constant = jnp.asarray(np.where(keep, 0.0, means), kernel.dtype) @ kernel
    if scaled:
        constant = constant * len(keep) ** -0.5
        kernel = kernel * (len(rows) / len(keep)) ** 0.5
    result["down"] = {"kernel": kernel[rows], "bias": mlp["down"].get("bias", 0.0) + constant}
    return result


def _require_prunable(config: TransformerConfig, keep: np.ndarray, means: np.ndarray) -> None:
    if config.scan or config.kind == "encoder-decoder":
        what = "scanned layers (`unstack_layers`)" if config.scan else "an encoder-decoder"
        raise InputError(f"layers of different widths are for unrolled encoders and decoders, not {what}")
    for index in range(config.layers):
        mlp = config.layer(index)[1]
        if not isinstance(mlp, MLP | GatedMLP):
            raise InputError(f"layer {index} has a {type(mlp).__name__}; plain and gated ones are pruned")
        shape = config.layers, mlp.width or 4 * config.width
        if keep.shape != shape or means.shape != shape:
            raise InputError(f"neurons to keep {keep.shape} and means {means.shape} must be {shape}")
    if not keep.any(1).all():
        raise InputError(f"layer {int(keep.any(1).argmin())} would have no neuron left; keep at least one")
