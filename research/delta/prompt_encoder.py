"""P-tuning: a network makes the prompt in training (Liu et al., 2021, arXiv 2103.10385)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from ... import InputError
from .input_prompt import InputPrompt
from .methods import Site, Variables
from .soft_prompt import SoftPrompt

KINDS = "mlp", "lstm"


@dataclass(frozen=True)
class PromptEncoder(InputPrompt):
    """The vectors of `InputPrompt` are made of an embedding `[n, D]` by an MLP or a bidirectional LSTM.

    "mlp", PEFT's default, is three linear layers with ReLU between; "lstm", the paper's, has `layers` layers
    and two linear ones after it. `width` is that of the hidden layers (0: D). The embedding starts from
    N(0, 1), the rest as in PyTorch, uniform in ±1/sqrt(inputs). `folded` gives the prompt that it makes.
    """

    kind: str = "mlp"
    width: int = 0
    layers: int = 2

    name: ClassVar[str] = "prompt_encoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS:
            raise InputError(f"prompt_encoder kind={self.kind!r} is not one of {', '.join(KINDS)}")
        if self.width < 0 or self.layers < 1:
            raise InputError(
                f"prompt_encoder width={self.width} must be at least 0 and layers={self.layers} at least 1"
            )

    def init(self, rng: jax.Array, site: Site, args: tuple, output: Any) -> Variables:
        """The embedding and the layers after it."""
        size = self.table(site, args).shape[1]
        width = self.width or size
        first, second, third = jax.random.split(rng, 3)
        made = {"embedding": jax.random.normal(first, (self.length, size))}
        if self.kind == "mlp":
            return {**made, **_linear_layers(second, (size, width, width, size))}
        for layer in range(self.layers):
            inputs = 2 * width if layer else size
            for direction in ("forward", "backward"):
                key = jax.random.fold_in(second, 2 * layer + (direction == "backward"))
                made |= _lstm_layer(key, f"{direction}_{layer}", inputs, width)
        return {**made, **_linear_layers(third, (2 * width, 2 * width, size))}

    def prompt(self, variables: Variables) -> jax.Array:
        """What the network makes of its embedding, `[n, D]`."""
        x = variables["embedding"]
        for layer in range(self.layers if self.kind == "lstm" else 0):
            forward = _lstm(variables, f"forward_{layer}", x)
            backward = _lstm(variables, f"backward_{layer}", x[::-1])[::-1]
            x = jnp.concatenate([forward, backward], -1)
        count = 2 if self.kind == "lstm" else 3
        for layer in range(count):
            x = x @ variables[f"kernel_{layer}"] + variables[f"bias_{layer}"]
            x = jax.nn.relu(x) if layer < count - 1 else x
        return x

    def folded(self, variables: Variables) -> tuple[SoftPrompt, Variables]:
        """The same as a plain prompt: the method and its variables."""
        return SoftPrompt(self.length, self.embed), {"prompt": self.prompt(variables)}


def _linear_layers(rng: jax.Array, sizes: tuple[int, ...]) -> dict[str, jax.Array]:
    made = {}
    for layer, (inputs, outputs) in enumerate(pairwise(sizes)):
        key = jax.random.fold_in(rng, layer)
        made[f"kernel_{layer}"] = _uniform(key, inputs, (inputs, outputs))
        made[f"bias_{layer}"] = jnp.zeros(outputs)
    return made


def _lstm_layer(rng: jax.Array, name: str, inputs: int, width: int) -> dict[str, jax.Array]:
    first, second = jax.random.split(rng)
    return {
        f"{name}_input": _uniform(first, width, (inputs, 4 * width)),
        f"{name}_hidden": _uniform(second, width, (width, 4 * width)),
        f"{name}_bias": jnp.zeros(4 * width),
    }


def _uniform(rng: jax.Array, inputs: int, shape: tuple[int, ...]) -> jax.Array:
    bound = inputs**-0.5
    return jax.random.uniform(rng, shape, minval=-bound, maxval=bound)


def _lstm(variables: Variables, name: str, x: jax.Array) -> jax.Array:
    """Hidden states `[n, width]` of one direction (Hochreiter and Schmidhuber, 1997); gates i, f, g, o."""
    gates = x @ variables[f"{name}_input"] + variables[f"{name}_bias"]
    hidden = variables[f"{name}_hidden"]

    def step(state: tuple[jax.Array, jax.Array], row: jax.Array) -> tuple[Any, jax.Array]:
        h, cell = state
        i, f, g, o = jnp.split(row + h @ hidden, 4)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(cell)
        return (h, cell), h

    start = jnp.zeros(hidden.shape[0], gates.dtype)
    return lax.scan(step, (start, start), gates)[1]
