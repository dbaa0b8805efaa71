"""A two-layer residual perceptron in plain JAX and its training: the smallest job with every kind of leaf.

Loaded by path, by the tests (fixture `toy`) and by `two_processes.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

L, V, D, F, B, T = 2, 64, 32, 64, 16, 8

TABLE = (
    (r"embedding/table", ("vocab", "width")),
    (r"mlp/up/kernel", ("width", "mlp")),
    (r"mlp/up/bias", ("mlp",)),
    (r"mlp/down/kernel", ("mlp", "width")),
    (r"mlp/down/bias", ("width",)),
    (r"norm/scale", ("width",)),
    (r"head/kernel", ("width", "vocab")),
)


def init(rng, dtype=jnp.float32):
    keys = jax.random.split(rng, 4)

    def normal(key, *shape):
        return (jax.random.normal(key, shape, jnp.float32) / np.sqrt(shape[-2])).astype(dtype)

    mlp = {
        "up": {"kernel": normal(keys[0], L, D, F), "bias": jnp.zeros((L, F), dtype)},
        "down": {"kernel": normal(keys[1], L, F, D), "bias": jnp.zeros((L, D), dtype)},
    }
    return {
        "embedding": {"table": normal(keys[2], V, D)},
        "layers": {"norm": {"scale": jnp.ones((L, D), dtype)}, "mlp": mlp},
        "head": {"kernel": normal(keys[3], D, V)},
    }


def loss(params, batch):
    def layer(x, p):
        y = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * p["norm"]["scale"]
        y = jax.nn.gelu(y @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"])
        return x + y @ p["mlp"]["down"]["kernel"] + p["mlp"]["down"]["bias"], None

    x, _ = jax.lax.scan(layer, params["embedding"]["table"][batch["tokens"]], params["layers"])
    losses = optax.softmax_cross_entropy_with_integer_labels(x @ params["head"]["kernel"], batch["targets"])
    return jnp.sum(losses * batch["weights"]) / jnp.sum(batch["weights"])


def batches(steps):
    rng = np.random.default_rng(0)
    for _ in range(steps):
        tokens = rng.integers(0, V, (B, T), dtype=np.int32)
        yield {"tokens": tokens, "targets": (tokens * 7 + 3) % V, "weights": np.ones((B, T), np.float32)}


def make_step(layout, optimizer, dtype=jnp.float32):
    """(shardings of the state, jitted init, jitted step), each laid out by `layout`."""

    def start(rng):
        params = init(rng, dtype)
        return {"trainable": params, "optimizer": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}

    def step(state, batch):
        value, grads = jax.value_and_grad(loss)(state["trainable"], batch)
        grads = jax.lax.with_sharding_constraint(grads, layout.gradients(grads, TABLE))
        updates, moments = optimizer.update(grads, state["optimizer"], state["trainable"])
        params = optax.apply_updates(state["trainable"], updates)
        return {"trainable": params, "optimizer": moments, "step": state["step"] + 1}, (value, grads)

    abstract = jax.eval_shape(start, jax.random.key(0))
    shardings = layout.state(abstract, TABLE)
    gradients = layout.gradients(abstract["trainable"], TABLE)
    replicated = layout.replicated()
    return (
        shardings,
        jax.jit(start, out_shardings=shardings),
        jax.jit(
            step,
            in_shardings=(shardings, layout.batch(next(batches(1)))),
            out_shardings=(shardings, (replicated, gradients)),
        ),
    )


def train(layout, steps, dtype=jnp.float32):
    """(initial parameters, gradients of the first step, losses), fetched to the host."""
    _, start, step = make_step(layout, optax.adamw(1e-2), dtype)
    state = start(jax.random.key(0))
    rows, losses, first = layout.local_rows(B), [], None
    initial = fetch(state["trainable"])
    for batch in batches(steps):
        mine = {name: leaf[rows] for name, leaf in batch.items()}
        state, (value, grads) = step(state, layout.place(mine))
        first = fetch(grads) if first is None else first
        losses.append(float(value))
    return initial, first, losses


def fetch(tree):
    """The whole arrays on the host, from however many processes."""
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
