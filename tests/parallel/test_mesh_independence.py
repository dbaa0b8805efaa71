"""The mesh and the ZeRO level change where numbers lie, not what they are: the real decoder and train step.

Double precision separates bugs from rounding: what is left at 1e-10 is not a bug. Single precision shows how
far rounding alone carries 20 steps. Dropout is on, so randomness is shown independent of the mesh as well.
"""

import math
import re
from functools import cache, partial

import flax.linen as nn
import jax
import numpy as np
import pytest

from modicum.parallel import Layout, MeshShape, bytes_per_device, make_mesh

pytestmark = pytest.mark.slow

STEPS = 20
DOUBLE = [
    ("data=8", 1),
    ("data=8", 3),
    ("data=4,tensor=2", 2),
    ("data=2,fsdp=2,tensor=2", 1),
    ("tensor=8", 0),
]
SINGLE = [
    ("data=8", 0),
    ("data=4,tensor=2", 3),
    ("data=2,fsdp=2,tensor=2", 3),
    ("tensor=8", 0),
]


def layout(mesh, zero):
    return Layout(make_mesh(MeshShape.parse(mesh)), zero=zero, minimum=0)


@pytest.fixture(scope="module")
def alone(decoder):
    """The same training on one device, made once for each precision."""
    return cache(lambda dtype: decoder.train(Layout.single(), STEPS, dtype))


@pytest.mark.parametrize(("mesh", "zero"), DOUBLE)
def test_double_precision(decoder, alone, mesh, zero, x64):
    expected, found = alone("float64"), decoder.train(layout(mesh, zero), STEPS, "float64")
    jax.tree.map(np.testing.assert_array_equal, found.initial, expected.initial)
    assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(found.initial))
    assert expected.losses[-1] < expected.losses[0] - 0.1  # it learns
    np.testing.assert_allclose(found.losses, expected.losses, rtol=0, atol=1e-10)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-10), found.moment, expected.moment)
    check_bytes(decoder, found, layout(mesh, zero))
    check_collectives(found, mesh, zero)


@pytest.mark.parametrize(("mesh", "zero"), SINGLE)
def test_single_precision(decoder, alone, mesh, zero):
    expected, found = alone("float32"), decoder.train(layout(mesh, zero), STEPS, "float32")
    jax.tree.map(np.testing.assert_array_equal, found.initial, expected.initial)
    np.testing.assert_allclose(found.losses[0], expected.losses[0], rtol=1e-5)
    check_gradients(found.moment, expected.moment)
    drift = max(abs(a - b) for a, b in zip(found.losses, expected.losses))
    print(f"{mesh} zero={zero}: the loss drifts by {drift:.1e} in {STEPS} steps")
    assert drift <= 1e-3
    check_bytes(decoder, found, layout(mesh, zero))
    check_collectives(found, mesh, zero)


def test_holding_the_rows_saves_communication(decoder):
    """`Layout.activations` at one hook, `embedded`: far less is gathered and moved to and fro."""
    where = layout("data=4,tensor=2", 3)

    def hold(call, args, kwargs, context):
        x = call(*args, **kwargs)
        return where.activations(x) if context.module.name == "embedded" else x

    def holding(forward):
        def held(*args, **kwargs):
            with nn.intercept_methods(hold):
                return forward(*args, **kwargs)

        return held

    free, held = (decoder.prepare(where, wrap=wrap).step.as_text() for wrap in (lambda f: f, holding))
    moved = {kind: [elements(text, kind) for text in (free, held)] for kind in ("all-gather", "all-to-all")}
    print("elements per step, free and held:", moved)
    assert all(after < before / 3 for before, after in moved.values())


def elements(text, kind):
    """The elements of all results of one kind of collective."""
    return sum(math.prod(shape) for shape in collective_shapes(text, kind))


def check_gradients(found, expected):
    """Each array equal to a relative 1e-5 of its norm.

    The gradient of a key bias is zero in exact arithmetic (it shifts all scores of a query alike): only
    rounding is left of it, without relative accuracy, and it must be small beside all others.
    """
    total = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(expected)))
    leaves = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected))
    for (path, a), b in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("key/bias"):
            assert max(np.linalg.norm(a), np.linalg.norm(b)) <= 1e-6 * total, name
        else:
            assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b), name


def check_bytes(decoder, result, where):
    """What each device holds is what was predicted, and what the compiled step says it takes in."""
    predicted = bytes_per_device(result.job.abstract, result.job.shardings)
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(result.state):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert set(held.values()) == {predicted}
    batch = next(decoder.batches(1))
    taken = result.job.step.memory_analysis().argument_size_in_bytes
    assert taken == predicted + bytes_per_device(batch, where.batch(batch))


def check_collectives(result, mesh, zero):
    """What the partitioner put into the compiled step for data parallelism over 8 devices.

    XLA for CPU makes no reduce-scatter: at every level it sums whole gradients and slices. So it is the
    gathers that tell the levels apart here: none without ZeRO; at level 1 every parameter once, after its
    update; at level 3 every matrix, before its use.
    """
    if mesh != "data=8":
        return
    text = result.job.step.as_text()
    gathered, reduced = (collective_shapes(text, name) for name in ("all-gather", "all-reduce"))
    params = sorted(leaf.shape for leaf in jax.tree.leaves(result.job.abstract.trainable))
    assert set(params) <= set(reduced)
    if zero == 0:
        assert gathered == []
    if zero == 1:
        assert sorted(gathered) == params
    if zero == 3:
        assert {(64, 32), (32, 32), (32, 128), (128, 32)} <= set(gathered)


def collective_shapes(text, name):
    """Shapes of all results of a kind of collective in compiled HLO, those of combined ones one by one."""
    results = re.findall(rf"= (.*?) {name}(?:-start)?\(", text)
    shapes = re.findall(r"\w+\[([\d,]*)\]", " ".join(results))
    return [tuple(int(size) for size in shape.split(",") if size) for shape in shapes]
