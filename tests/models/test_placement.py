"""A placed model is the model: on meshes, under scan, remat and gradients, with deltas in its attention."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum.models import FP64, MLP, GroupedQuery, Rotary, Transformer, TransformerConfig
from modicum.models.placement import placed
from modicum.parallel import Layout, MeshShape, make_mesh
from modicum.research.delta import Prefix, attach

pytestmark = pytest.mark.usefixtures("quick_compile")

B, T = 4, 8
CONFIG = TransformerConfig(
    layers=2,
    width=16,
    vocab=12,
    attention=GroupedQuery(4, 2, window=5, soft_cap=20.0),
    positions=Rotary(),
    mlp=MLP(8),
    precision=FP64,
    dropout=0.1,
    scan=True,
    remat="full",
)
NUMBERS = np.random.default_rng(0)
TOKENS = NUMBERS.integers(0, 12, (B, T))
SEGMENTS = np.array([[1] * 3 + [2] * 5, [1] * 8, [1] * 6 + [0] * 2, [1, 2] + [3] * 6])


def layout(mesh, order="contiguous"):
    shape = MeshShape.parse(mesh)
    return Layout(make_mesh(shape, jax.devices()[: shape.size]), order=order)


@pytest.fixture(scope="module")
def tuned():
    """A model with prefixes in its attention, its loss, and the loss's gradients on one device."""
    with jax.enable_x64(True):
        model = attach(Transformer(CONFIG), {"attention": Prefix(3)})
        params = model.model.init(jax.random.key(0), TOKENS)
        variables = model.init(jax.random.key(1), params, TOKENS)

        def loss(params, delta, tokens, segments):
            given = {"segments": segments, "rng": jax.random.key(2), "train": True}
            logits = model.apply({**variables, "delta": delta}, params, tokens, **given)
            return jnp.sin(logits).mean()  # of any order of the columns

        given = params, variables["delta"], TOKENS, SEGMENTS
        return loss, given, jax.jit(jax.value_and_grad(loss, (0, 1)))(*given), model


@pytest.mark.parametrize(
    "mesh, order",
    [
        ("data=2,tensor=2", "contiguous"),
        ("fsdp=2,context=2,tensor=2", "contiguous"),
        ("data=2,context=2,tensor=2", "zigzag"),
    ],
)
def test_values_and_gradients_are_those_of_one_device(tuned, mesh, order, x64, caplog):
    loss, (params, delta, *inputs), wanted, model = tuned
    where = layout(mesh, order)
    params = jax.device_put(params, where.parameters(params, model.model.axes))
    run = jax.jit(jax.value_and_grad(placed(loss, where), (0, 1)))
    with caplog.at_level(logging.INFO, "modicum.kernels"):
        found = run(params, delta, *where.place(inputs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), found, wanted)
    length = T // where.mesh.shape["context"] // (2 if order == "zigzag" else 1)
    assert f"B={B // 2} T={length} " in caplog.text  # of each device's own part
    assert "H=2 G=1" in caplog.text


def test_on_one_device_nothing_is_wrapped():
    assert placed(len, layout("data=1")) is len


def test_inside_a_shard_map_the_other_axes_count(tuned, x64):
    loss, given, (wanted, _), _ = tuned
    where = layout("fsdp=2,data=2")
    stage = jax.shard_map(
        lambda *given: jax.lax.pmean(placed(loss, where)(*given), "fsdp"),
        mesh=where.mesh,
        in_specs=jax.P(),
        out_specs=jax.P(),
        axis_names={"fsdp"},
    )
    np.testing.assert_allclose(jax.jit(stage)(*given), wanted, rtol=1e-12)
    whole = jax.shard_map(placed(loss, where), mesh=where.mesh, in_specs=jax.P(), out_specs=jax.P())
    np.testing.assert_allclose(jax.jit(whole)(*given), wanted, rtol=1e-12)
