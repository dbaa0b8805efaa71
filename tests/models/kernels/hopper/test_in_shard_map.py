"""The Hopper kernels inside `shard_map`, traced only: JAX tracks over which mesh axes values vary."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import P
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from modicum.models.kernels import Causal, Dense, Dropout, Paged, Segments, Terms
from modicum.models.kernels.hopper import Hopper
from modicum.models.kernels.hopper.decoding import HopperPages
from modicum.parallel import MeshShape, make_mesh

INTERPRETED = InterpretGPUParams()


def array(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


def traced(function, *given, specs):
    """Shapes and types of what it gives on two devices that have half of the rows each."""
    mesh = make_mesh(MeshShape.parse("data=2"), jax.devices()[:2])
    placed = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P("data"))
    return jax.eval_shape(placed, *given)


@pytest.mark.parametrize("deterministic", [True, False])
def test_values_and_gradients_vary_as_their_operands_do(deterministic):
    hopper = Hopper(interpret=INTERPRETED, deterministic=deterministic)
    q, k, ids = array(2, 128, 2, 64), array(2, 128, 1, 64), array(2, 128, dtype="int32")

    allowed = array(2, 1, 128, 128, dtype="bool")

    def gradients(q, k, v, ids, allowed):
        mask = Causal() & Segments(ids) & Dense(allowed)
        terms = Terms(mask, dropout=Dropout(0.1, jnp.uint32(3), batch=jax.lax.axis_index("data")))
        found, pull = jax.vjp(functools.partial(hopper, terms=terms), q, k, v)
        varying = [jax.typeof(x).manual_axis_type.varying for x in found]
        assert varying == [{"data"}] * 2  # or the cotangents would be summed over devices
        return pull(found)

    assert traced(gradients, q, k, k, ids, allowed, specs=P("data")) == (q, k, k)


def test_pages_too():
    pages, table, lengths = array(16, 16, 1, 64), array(2, 8, dtype="int32"), array(2, dtype="int32")

    def attend(q, pages, table, lengths):
        cache = Paged(pages, table)
        return HopperPages(interpret=INTERPRETED)(q, cache, cache, lengths, Terms(Causal(lengths - 1)))

    given = array(2, 1, 2, 64), pages, table, lengths
    out, lse = traced(attend, *given, specs=(P("data"), P(), P("data"), P("data")))
    assert out.shape == (2, 1, 2, 64) and lse.shape == (2, 2, 1)
