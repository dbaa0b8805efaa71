"""What a configuration computes, spelled out, so that two ways of writing the same model compare equal."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from .. import GroupedQuery, Rotary, TransformerConfig
from ..config import FeedForward

# How a model is run and how it would be trained from scratch; no published file of weights has it.
NOT_COMPARED = ("scan", "remat", "vocab_multiple", "precision", "dropout", "initial_std")
# Told by every layer instead.
PER_LAYER = ("attention", "mlp", "pattern")


def described(config: TransformerConfig) -> dict[str, Any]:
    """Fields of a configuration and `layer_i`, each with what 0 and None stand for filled in."""
    left = (*NOT_COMPARED, *PER_LAYER)
    values = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in left}
    values["decoder_layers"] = config.depth_of_decoder
    values["embedding_width"] = config.embedding_width or config.width
    values["embedding_scale"] = config.embedding_scale or config.width**0.5
    if isinstance(config.positions, Rotary):
        width = config.positions.width or config.attention.width_of_head(config.width)
        values["positions"] = replace(config.positions, width=width)
    for index in range(max(config.layers, config.depth_of_decoder)):
        values[f"layer_{index}"] = _layer(config, index)
    return values


def _layer(config: TransformerConfig, index: int) -> tuple[GroupedQuery | None, FeedForward | None]:
    attention, mlp = config.layer(index)
    width = attention.width_of_head(config.width)
    plain = replace(
        attention,
        kv_heads=attention.groups,
        head_width=width,
        scale=attention.scale or width**-0.5,
        output_bias=attention.bias if attention.output_bias is None else attention.output_bias,
        implementation="auto",
    )
    return (
        None if config.lacks(index, "attention") else plain,
        None if config.lacks(index, "mlp") else replace(mlp, width=mlp.width or 4 * config.width),
    )
