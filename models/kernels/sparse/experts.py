"""A feed-forward layer cut into experts: neurons in groups, each group's weights side by side."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import struct
from jax import Array

from .... import InputError
from ...mlp import activation_function

OPTIONAL = ("gate", "up_bias", "gate_bias")


@struct.dataclass
class Experts:
    """E experts of n neurons each, of a feed-forward layer with E n neurons of width D.

    `up`, `gate` and `down` are `[E, n, D]`: a neuron is a row of each, so that an expert's weights are read
    in one piece. Biases are `[E, n]`, `down_bias` is `[D]`; None where the layer has none. With a `gate` a
    neuron is `activation(gate·x) (up·x)`, without one `activation(up·x)`.
    """

    up: Array
    down: Array
    gate: Array | None = None
    up_bias: Array | None = None
    gate_bias: Array | None = None
    down_bias: Array | None = None
    activation: str = struct.field(pytree_node=False, default="relu")

    @property
    def count(self) -> int:
        """E."""
        return self.up.shape[0]

    @property
    def size(self) -> int:
        """n, the neurons of one expert."""
        return self.up.shape[1]

    @property
    def width(self) -> int:
        """D."""
        return self.up.shape[2]

    def without_output_bias(self) -> Experts:
        """The same without the bias of `down`, so that every leaf begins with the axis of experts."""
        return dataclasses.replace(self, down_bias=None)

    def check(self, x: Any, chosen: Any) -> None:
        """Raise `InputError` where x `[..., D]`, chosen `[..., k]` and the weights do not fit together."""
        activation_function(self.activation)
        if self.up.ndim != 3 or self.down.shape != self.up.shape:
            raise InputError(
                f"experts: up {list(self.up.shape)} and down {list(self.down.shape)} must both be "
                f"[experts, neurons, width]"
            )
        expected = {"gate": self.up.shape, "up_bias": self.up.shape[:2], "gate_bias": self.up.shape[:2]}
        for name in OPTIONAL:
            found = getattr(self, name)
            if found is not None and found.shape != expected[name]:
                raise InputError(f"experts: {name} is {list(found.shape)}, not {list(expected[name])}")
        if self.gate_bias is not None and self.gate is None:
            raise InputError("experts: gate_bias is given and gate is not")
        if self.down_bias is not None and self.down_bias.shape != (self.width,):
            raise InputError(f"experts: down_bias is {list(self.down_bias.shape)}, not {[self.width]}")
        if x.shape[-1] != self.width or chosen.shape[:-1] != x.shape[:-1]:
            raise InputError(
                f"sparse_feed_forward: x {list(x.shape)} and chosen {list(chosen.shape)} must be [..., "
                f"{self.width}] and [..., k] with the same axes in front"
            )
        if not 1 <= chosen.shape[-1] <= self.count:
            raise InputError(f"{chosen.shape[-1]} experts a token of {self.count}; at least 1 is valid")


def neurons(experts: Experts, x: Array, products: Any) -> Array:
    """What the neurons are, by `products(weights, x)`, which contracts D; biases must fit its result."""
    act = activation_function(experts.activation)

    def linear(weights: Array, bias: Array | None) -> Array:
        product = products(weights, x)
        return product if bias is None else product + bias

    up = linear(experts.up, experts.up_bias)
    return act(up) if experts.gate is None else act(linear(experts.gate, experts.gate_bias)) * up
