"""LoRA+: B gets its own learning rate, and nothing else does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from modicum import InputError
from modicum.research.training.lora_plus import lora_plus

DELTA = {
    "layers": {
        "query": {"~lora": {"a": jnp.ones((2, 3, 2)), "b": jnp.full((2, 2, 3), 0.5)}},
        "value": {"~dora_1": {"a": jnp.ones(3), "b": jnp.ones(3), "magnitude": jnp.ones(3)}},
    },
    "down": {"~adalora": {"a": jnp.ones(3), "e": jnp.ones(3), "b": jnp.ones(3)}},
    "b": {"~full": {"value": jnp.ones(3)}},
    "odd": {"~mine": {"b": jnp.ones(3)}},
}


def steps(optimizer, count=3):
    params, state = DELTA, optimizer.init(DELTA)
    update = jax.jit(optimizer.update)
    for _ in range(count):
        updates, state = update(jax.tree.map(jnp.cos, params), state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_b_learns_as_in_a_parameter_group_of_its_own():
    """Decoupled weight decay included, which grows with the group's learning rate."""
    got = steps(optax.chain(optax.adamw(1e-2, weight_decay=0.1), lora_plus(8.0)))
    slow, fast = steps(optax.adamw(1e-2, weight_decay=0.1)), steps(optax.adamw(8e-2, weight_decay=0.1))
    for path, leaf in jax.tree_util.tree_flatten_with_path(got)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        is_b = name in ("layers/query/~lora/b", "layers/value/~dora_1/b", "down/~adalora/b")
        wanted = fast if is_b else slow
        for key in path:
            wanted = wanted[key.key]
        np.testing.assert_allclose(leaf, wanted, rtol=1e-6)


def test_what_makes_no_sense_is_an_error():
    with pytest.raises(InputError, match=r"lora_plus ratio=0\.0 must be above 0 and finite"):
        lora_plus(0.0)
    with pytest.raises(InputError, match="nothing that is trained is the B of a LoRA"):
        lora_plus(4.0).init({"~adapter": {"b": jnp.ones(2)}})
