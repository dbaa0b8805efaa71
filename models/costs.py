"""What a model costs, from its shapes alone: parameters, bytes and floating-point operations.

Nothing is allocated: shapes come from `jax.eval_shape`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from .. import InputError
from .config import TransformerConfig
from .experts import RoutedMLP
from .moefied import EXPERT_WEIGHTS, MoefiedMLP
from .selection import SELECTION_WEIGHTS
from .transformer import Transformer

WEIGHTS = ("kernel", *EXPERT_WEIGHTS, *SELECTION_WEIGHTS)
"""What the matrices that multiply tokens are called."""


def abstract_parameters(model: Transformer) -> Any:
    """The parameter tree as shapes and types."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    extra = {"decoder_tokens": tokens} if model.config.kind == "encoder-decoder" else {}
    return jax.eval_shape(lambda rng, x, more: model.init(rng, x, **more), jax.random.key(0), tokens, extra)


def parameter_count(model: Transformer) -> int:
    """How many numbers the model holds; a tied table counts once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_parameters(model)))


def active_parameter_count(model: Transformer) -> int:
    """How many of them one token is computed with: of routed experts those it chose, of the rest all."""
    return parameter_count(model) - _idle_weights(model.config)


def parameter_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def training_flops_per_token(config: TransformerConfig, length: int) -> float:
    """Model FLOPs of one training step per token of a decoder or encoder, forward and backward.

    6 per weight that a token is multiplied with (of routed experts, the chosen ones'), the logits' included
    and embedding look-ups not, plus attention's 12 L H K S, halved where causal since half the scores are
    masked (Chowdhery et al., PaLM, 2022, appendix B, with the causal half made explicit). Recomputation does
    not count: this is what model FLOPs utilisation (MFU) is a fraction of. Raises `InputError` for an
    encoder-decoder, whose two lengths this does not take.
    """
    if config.kind == "encoder-decoder":
        raise InputError("training_flops_per_token takes a decoder or an encoder, not an encoder-decoder")
    layers = (config.layer(index)[0] for index in range(config.layers))
    attended = sum(
        _keys_in_reach(layer.window, length) * layer.heads * layer.width_of_head(config.width)
        for layer in layers
    )
    causal = 0.5 if config.kind == "decoder" else 1.0
    return 6.0 * matrix_weights(config) + 12.0 * attended * causal


def _keys_in_reach(window: int, length: int) -> float:
    """How many keys a query sees on average, both ways, in a band of `window` to each side."""
    reach = min(window or length, length)
    return 2 * reach - reach**2 / length


def matrix_weights(config: TransformerConfig) -> int:
    """Weights that multiply each token: kernels, of experts the chosen ones', and the tied table."""
    flat, _ = jax.tree.flatten_with_path(abstract_parameters(Transformer(config)))
    kernels = sum(math.prod(leaf.shape) for path, leaf in flat if path[-1].key in WEIGHTS)
    return kernels + (config.padded_vocab * config.width if config.tied else 0) - _idle_weights(config)


def _idle_weights(config: TransformerConfig) -> int:
    """Weights of the experts that a token did not choose."""
    depth = config.layers + (config.depth_of_decoder if config.kind == "encoder-decoder" else 0)
    choices = [config.layer(index)[1] for index in range(depth) if not config.lacks(index, "mlp")]
    return sum(mlp.idle_weights(config.width) for mlp in choices if isinstance(mlp, RoutedMLP | MoefiedMLP))
