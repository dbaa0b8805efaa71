"""The mesh and the ZeRO level change where numbers lie, not what they are: the real decoder and train step.

Double precision separates bugs from rounding: what is left at 1e-10 is not a bug. Single and half precision
show how far rounding alone carries 20 steps. Dropout is on, so randomness is shown independent of the mesh
as well (but in a pipeline, which refuses it); documents are packed, the vocabulary is padded, and a token
may be routed to experts.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import numpy as np
import pytest

from modicum.parallel import Layout, MeshShape, bytes_per_device, make_mesh
from modicum.research.training.loss_scale import Scaling

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]

STEPS = 20


class Case(NamedTuple):
    """A row of the table: where a training runs and what it trains."""

    mesh: str
    zero: int = 0
    mlp: str = "dense"
    chunk: int | None = None
    order: str = "contiguous"
    accumulate: int = 1
    dropout: float = 0.1

    def __str__(self):
        extra = {"mlp": "dense", "chunk": None, "order": "contiguous", "accumulate": 1, "dropout": 0.1}
        said = [
            f"{name}={getattr(self, name)}" for name, usual in extra.items() if getattr(self, name) != usual
        ]
        return " ".join([self.mesh, f"zero={self.zero}", *said])

    @property
    def layout(self):
        shape = MeshShape.parse(self.mesh)
        devices = jax.devices()[: shape.size]
        return Layout(make_mesh(shape, devices), zero=self.zero, minimum=0, order=self.order)


# Every axis alone and in pairs, every ZeRO level; both orders of the columns; the loss whole and in chunks.
DOUBLE = [
    Case("data=4", 1),
    Case("data=4", 2, chunk=8),
    Case("data=4", 3),
    Case("fsdp=4", 0, accumulate=2),
    Case("tensor=4", 0, chunk=40),
    Case("context=4", 0),
    Case("data=2,tensor=2", 3, chunk=8),
    Case("data=2,context=2", 1, order="zigzag"),
    Case("data=2,fsdp=2,tensor=2", 1),
    Case("fsdp=2,context=2,tensor=2", 0, order="zigzag"),
    Case("data=2,expert=2,tensor=2", 1, mlp="routed"),
    Case("fsdp=2,expert=2,context=2", 0, mlp="routed"),
    Case("pipe=2,fsdp=2", 1, dropout=0.0),
]
SINGLE = [Case("data=2,context=2,tensor=2", 3)]
HALF = [
    ("bf16", Case("fsdp=2,context=2", 0)),
    ("bf16", Case("pipe=2,fsdp=2", 1, dropout=0.0)),
    ("fp16", Case("data=2,tensor=2", 3, chunk=8)),
    ("fp16", Case("data=2,expert=2,tensor=2", 1, mlp="routed")),
]
OVERFLOWING = Scaling(initial=2.0**24, growth_interval=4)


@pytest.fixture(scope="module")
def alone(decoder):
    """The same training on one device, made once for each precision and model."""

    @cache
    def train(precision, mlp="dense", **options):
        return decoder.train(Layout.single(), STEPS, precision, mlp, **options)

    return train


def train(decoder, case, precision, **options):
    return decoder.train(
        case.layout,
        STEPS,
        precision,
        case.mlp,
        chunk=case.chunk,
        accumulate=case.accumulate,
        dropout=case.dropout,
        **options,
    )


@pytest.mark.parametrize("case", DOUBLE, ids=str)
def test_double_precision(decoder, alone, case, x64):
    # Parts draw their own dropout.
    expected = alone("fp64", case.mlp, accumulate=case.accumulate, dropout=case.dropout)
    found = train(decoder, case, "fp64")
    jax.tree.map(np.testing.assert_array_equal, found.initial, expected.initial)
    assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(found.initial))
    assert expected.losses[-1] < expected.losses[0] - 0.1  # it learns
    np.testing.assert_allclose(found.losses, expected.losses, rtol=0, atol=1e-10)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-10), found.moment, expected.moment)
    check_bytes(found)


@pytest.mark.parametrize("case", SINGLE, ids=str)
def test_single_precision(decoder, alone, case):
    expected, found = alone("fp32", case.mlp), train(decoder, case, "fp32")
    jax.tree.map(np.testing.assert_array_equal, found.initial, expected.initial)
    np.testing.assert_allclose(found.losses[0], expected.losses[0], rtol=1e-5)
    check_gradients(found.moment, expected.moment)
    drift = max(abs(a - b) for a, b in zip(found.losses, expected.losses))
    print(f"fp32 {case}: the loss drifts by {drift:.1e} in {STEPS} steps")
    assert drift <= 1e-3
    check_bytes(found)


@pytest.mark.parametrize(("precision", "case"), HALF, ids=str)
def test_half_precision(decoder, alone, precision, case):
    """The same steps overflow on every mesh: the scale and the count of skipped steps are equal."""
    options = {"scaling": OVERFLOWING} if precision == "fp16" else {}
    # In chunks the head's gradient is summed in float32 and overflows later: the reference is in chunks too.
    expected = alone(precision, case.mlp, chunk=case.chunk, dropout=case.dropout, **options)
    found = train(decoder, case, precision, **options)
    jax.tree.map(np.testing.assert_array_equal, found.initial, expected.initial)
    drift = max(abs(a - b) for a, b in zip(found.losses, expected.losses))
    print(f"{precision} {case}: the loss drifts by {drift:.1e} in {STEPS} steps")
    assert drift <= 1e-2
    if precision == "fp16":
        assert found.metrics["skipped_steps"] == expected.metrics["skipped_steps"] > 0
        assert found.metrics["loss_scale"] == expected.metrics["loss_scale"]


def check_gradients(found, expected):
    """Each array equal to a relative 1e-5 of its norm."""
    leaves = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected))
    for (path, a), b in leaves:
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b), path


def check_bytes(result):
    """What each device holds is what was predicted."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, result.program.abstract)
    predicted = bytes_per_device(result.program.abstract, shardings)
    held = dict.fromkeys(result.state.step.sharding.device_set, 0)
    for leaf in jax.tree.leaves(result.state):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert set(held.values()) == {predicted}
