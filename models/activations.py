"""Activation functions as a person writes them, and a configuration with another one in it.

A name (`relu`, `relu2`, `gelu`, ..., `drelu` for both products of a gated layer), or one that takes a number:
`fatrelu:0.1`, `topk:32`, `statistical-topk:32`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .. import InputError
from .config import FeedForward, TransformerConfig
from .mlp import ACTIVATIONS, DRELU, MLP, Activation, GatedMLP
from .sparse_activations import FATReLU, StatisticalTopK, TopK

NUMBERED: dict[str, tuple[Callable[[Any], Activation], Callable[[str], float], str]] = {
    "fatrelu": (FATReLU, float, "0.1"),
    "topk": (TopK, int, "32"),
    "statistical-topk": (StatisticalTopK, int, "32"),
}
EXAMPLES = tuple(f"{name}:{number}" for name, (_, _, number) in NUMBERED.items())
SILENCING = ("relu", "relu2", DRELU, *EXAMPLES)
"""Those that leave neurons at exactly 0."""


def parse_activation(text: str, valid: tuple[str, ...] = (*ACTIVATIONS, DRELU, *EXAMPLES)) -> Activation:
    """The activation function that is written so; raises `InputError` listing the `valid` ones for others.

    Of `valid` a numbered one stands for itself with any number.
    """
    name, colon, number = text.partition(":")
    known = {each.partition(":")[0] for each in valid}
    if name not in known or (name in NUMBERED) != bool(colon):
        raise InputError(f"activation {text!r} is unknown; valid: {', '.join(valid)}")
    if not colon:
        return name
    make, kind, example = NUMBERED[name]
    try:
        value = kind(number)
    except ValueError:
        what = "whole number" if kind is int else "number"
        raise InputError(f"activation {text!r}: {number!r} is no {what}; {name}:{example} is valid") from None
    return make(value)


def change_activation(config: TransformerConfig, activation: Activation) -> TransformerConfig:
    """The same configuration with another activation function in all its dense feed-forward layers.

    Parameters are the same. Raises `InputError` for layers of another kind, and for drelu in plain ones.
    """

    def changed(choice: FeedForward) -> FeedForward:
        if not isinstance(choice, MLP | GatedMLP):
            raise InputError(f"mlp is a {type(choice).__name__}; an MLP or a GatedMLP can be changed")
        if activation == DRELU and isinstance(choice, MLP):
            raise InputError(
                "activation 'drelu' is ReLU on both products of a gated layer; this one is plain"
            )
        return replace(choice, activation=activation)

    pattern = tuple(
        layer if layer.mlp is None else replace(layer, mlp=changed(layer.mlp)) for layer in config.pattern
    )
    return replace(config, mlp=changed(config.mlp), pattern=pattern)


def neurons_of(activation: Activation) -> str:
    """The hook at which a neuron of such a layer is silent: drelu's are products."""
    return "mlp/mid" if activation == DRELU else "mlp/act"
