"""Feed-forward layers whose experts are known: neurons of a topic fire on its tokens and on no others."""

import jax.numpy as jnp
import numpy as np

from modicum.models.kernels.sparse import Experts

TOPICS, SIZE, WIDTH = 6, 8, 24
NEURONS = TOPICS * SIZE


def topics(seed=0):
    """Orthonormal directions `[TOPICS, WIDTH]`."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(WIDTH, TOPICS)))[0].T.astype(np.float32)


def planted_layer(seed=0, gated=False, shuffled=False):
    """`(dense, labels)`: neurons in random order, each a topic's direction and a little noise.

    `shuffled` is the control: each neuron's weights in an order of their own, so that there are no groups.
    """
    draw = np.random.default_rng(seed)
    labels = draw.permutation(np.repeat(np.arange(TOPICS), SIZE))
    weights = topics()[labels] + 0.03 * draw.normal(size=(NEURONS, WIDTH)).astype(np.float32)
    if shuffled:
        weights = draw.permuted(weights, axis=1)
    own = {"gate": jnp.asarray(weights)[:, None], "gate_bias": jnp.full((NEURONS, 1), -0.5)} if gated else {}
    up = draw.normal(size=(NEURONS, WIDTH)).astype(np.float32) if gated else weights
    return Experts(
        up=jnp.asarray(up)[:, None],
        down=jnp.asarray(draw.normal(size=(NEURONS, 1, WIDTH)), jnp.float32),
        up_bias=jnp.full((NEURONS, 1), 0.0 if gated else -0.5),
        down_bias=jnp.zeros(WIDTH),
        activation="relu",
        **own,
    ), labels


def planted_inputs(tokens=2000, seed=1):
    """Tokens near one topic each, `[tokens, WIDTH]`."""
    draw = np.random.default_rng(seed)
    noise = 0.05 * draw.normal(size=(tokens, WIDTH))
    return (topics()[draw.integers(0, TOPICS, tokens)] + noise).astype(np.float32)


def same_groups(groups, labels):
    """Whether each group has all neurons of one topic and no other."""
    return all(len(set(labels[group])) == 1 for group in groups) and groups.size == len(labels)
