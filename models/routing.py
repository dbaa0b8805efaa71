"""Which experts a token goes to, and the losses that keep a router's choices even."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

COLLECTION = "routing"
LEAF = "sums"


@struct.dataclass
class RoutingSums:
    """What a layer's router did, summed over tokens: sums add up over micro-batches, means do not.

    `load [E]` counts the tokens sent to each expert, `probability [E]` sums the router's probabilities,
    `squares []` the squared log-partition functions; `tokens []` is their number. With scanned layers each
    has an axis `[L, ...]` in front. `balance` and `z_loss` are the layer's weights of the two losses.
    """

    load: jax.Array
    probability: jax.Array
    squares: jax.Array
    tokens: jax.Array
    balance: float = struct.field(pytree_node=False)
    z_loss: float = struct.field(pytree_node=False)


def choose(logits: jax.Array, chosen: int, normalised: bool) -> tuple[jax.Array, jax.Array]:
    """Experts `[..., k]` of the largest `logits [..., E]`, best first, and the weights of what they return.

    Weights are softmax probabilities; `normalised`, those of the chosen are made to sum to 1 (Mixtral,
    GShard), otherwise not (Switch, OLMoE).
    """
    largest, experts = jax.lax.top_k(logits, chosen)
    if normalised:
        return experts, jax.nn.softmax(largest, axis=-1)
    return experts, jnp.exp(largest - jax.nn.logsumexp(logits, axis=-1, keepdims=True))


def routing_sums(logits: jax.Array, experts: jax.Array, balance: float, z_loss: float) -> RoutingSums:
    """Sums of `logits [B, T, E]` and the `experts [B, T, k]` chosen."""
    choices = jnp.arange(logits.shape[-1])
    load = (experts[..., None] == choices).astype(logits.dtype).sum(range(experts.ndim))
    log_partition = jax.nn.logsumexp(logits, axis=-1)
    tokens = jnp.asarray(log_partition.size, logits.dtype)
    probability = jax.nn.softmax(logits, axis=-1).sum(range(logits.ndim - 1))
    return RoutingSums(load, probability, jnp.square(log_partition).sum(), tokens, balance, z_loss)


def routing_losses(sown: Mapping[str, Any]) -> dict[str, jax.Array]:
    """From what the layers sowed: what to add to the mean loss, and how even the routing was.

    * `routing_loss`, summed over layers: `balance` E Σ f_e P_e, with the fraction f of choices and the mean
      probability P of each expert, 1 where all are equal (Fedus et al. 2022, "Switch Transformers", eq. 4,
      arXiv:2101.03961); and `z_loss` mean(logsumexp(logits)²) (Zoph et al. 2022, "ST-MoE", eq. 5,
      arXiv:2202.08906).
    * `busiest_expert`: the load of the busiest expert of any layer over the mean load, 1 to E.
    """
    layers = jax.tree.leaves(sown, is_leaf=lambda node: isinstance(node, RoutingSums))
    added, busiest = [], []
    for sums in layers:
        fraction = sums.load / sums.load.sum(-1, keepdims=True)
        mean = sums.probability / sums.tokens[..., None]
        uneven = sums.load.shape[-1] * (jax.lax.stop_gradient(fraction) * mean).sum(-1)
        added.append((sums.balance * uneven + sums.z_loss * sums.squares / sums.tokens).sum())
        busiest.append((fraction * sums.load.shape[-1]).max())
    return {"routing_loss": jnp.stack(added).sum(), "busiest_expert": jnp.stack(busiest).max()}


def sow_routing(module: nn.Module, sums: RoutingSums) -> None:
    """Keep the sums in the collection `routing` of a call that asks for it (`mutable=["routing"]`)."""
    if not module.is_initializing():
        module.sow(COLLECTION, LEAF, sums, reduce_fn=lambda _, new: new, init_fn=lambda: None)
