"""The ring's fold on numbers whose sums are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from modicum.parallel.ring import ring_fold

P = PartitionSpec("ring")


def on_devices(devices, outputs):
    mesh = jax.make_mesh((devices,), ("ring",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    return functools.partial(jax.shard_map, mesh=mesh, in_specs=P, out_specs=outputs)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_each_device_meets_the_part_of_every_device(devices):
    """Device d folds a number of every origin in the ring's order; each part collects from all devices."""

    @jax.jit
    @on_devices(devices, (P, P, P))
    def fold(parts):
        here = jax.lax.axis_index("ring")

        def step(part, origin):
            return (part * 10 + origin)[None], 100 * (here + 1) + 0 * part

        def merge(total, found):
            seen, count = total
            at = jnp.arange(devices)[None] == count
            return jnp.where(at, found, seen), count + 1

        start = jnp.zeros_like(parts, shape=(1, devices)) + 0 * parts[:, None], 0 * parts
        (seen, count), home = ring_fold(step, merge, start, parts, "ring", 0 * parts)
        return seen, count, home

    parts = jnp.arange(1, devices + 1)
    seen, count, home = fold(parts)
    order = [[(d - i) % devices for i in range(devices)] for d in range(devices)]
    np.testing.assert_array_equal(seen, [[(o + 1) * 10 + o for o in row] for row in order])
    np.testing.assert_array_equal(count, [devices] * devices)
    np.testing.assert_array_equal(home, [100 * devices * (devices + 1) // 2] * devices)


def test_it_is_differentiable_and_sends_each_part_once_round():
    devices = 4
    x = jnp.arange(1.0, 9.0)

    @jax.jit
    @on_devices(devices, P)
    def totals(x):
        step = lambda part, origin: ((part * (origin + 1)).sum()[None], None)  # noqa: E731
        return ring_fold(step, jnp.add, 0 * x[:1], x, "ring")[0]

    weights = jnp.repeat(jnp.arange(1.0, 5.0), 2)
    np.testing.assert_allclose(totals(x), [(x * weights).sum()] * devices)
    np.testing.assert_allclose(jax.grad(lambda x: totals(x).sum())(x), devices * weights)
    text = totals.lower(x).as_text()
    assert text.count("collective_permute") == 1 and text.count("all_gather") == 0
