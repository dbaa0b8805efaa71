"""Attention on a mesh is attention on one device, in float64; where nothing has to move, nothing does."""

import functools
import re

import jax
import numpy as np
import pytest

from modicum import InputError
from modicum.models.kernels import (
    ALiBi,
    Bucketed,
    Causal,
    Dense,
    DenseBias,
    Dropout,
    Full,
    Keys,
    Lengths,
    Mask,
    Prefix,
    Queries,
    Relations,
    Segments,
    Window,
    attention,
    sharded_attention,
    zigzag_order,
)
from modicum.models.kernels.letters import map_arrays
from modicum.models.kernels.sharded import share_heads, share_rows
from modicum.models.placement import attention_axes
from modicum.parallel import Layout, MeshShape, make_mesh

pytestmark = pytest.mark.usefixtures("quick_compile")

B, T, H, K = 4, 16, 4, 4
RNG = np.random.default_rng(0)
IDS = Segments(np.repeat(RNG.integers(0, 3, (B, T // 4)), 4, axis=1))
DROPOUT = Dropout(0.3, np.uint32(5))


def places(axis):
    return RNG.integers(0, 9, (B, axis))


CALLS = {
    "data=2,tensor=4": {  # two key heads for four devices: each takes the one it reads
        "groups": 2,
        "mask": Causal() & IDS,
        "bias": Bucketed(RNG.normal(size=(8, H)), max_distance=16),
        "sinks": RNG.normal(size=H),
        "dropout": DROPOUT,
    },
    "fsdp=2,tensor=2": {
        "groups": 2,
        "mask": (Prefix(RNG.integers(0, 9, B)) | Queries(RNG.random((1, T)) > 0.7))
        & Keys(RNG.random((B, T)) > 0.3),
        "bias": Relations(
            RNG.normal(size=(10, H)),
            RNG.integers(0, 3, (B, T, 2)),
            *(RNG.integers(0, 2, (B, T)), places(T), places(T)),
            buckets=8,
            max_distance=8,
        ),
    },
    "data=2,context=2,tensor=2": {
        "groups": 2,
        "order": "zigzag",
        "mask": Causal() & IDS & ~Dense(RNG.random((B, 1, T, T)) > 0.8),
        "bias": DenseBias(RNG.normal(size=(1, H, T, T))),
        "dropout": DROPOUT,
    },
    "data=2,context=4": {
        "groups": 1,
        "mask": Lengths(np.array([0, 16, 3, 9])) & Window(6, 3),
        "bias": ALiBi(RNG.normal(size=H)),
        "method": "gather",
    },
}


def axes_of(mesh, **changes):
    shape = MeshShape.parse(mesh)
    axes = attention_axes(Layout(make_mesh(shape, jax.devices()[: shape.size])))
    return axes.__class__(**{**vars(axes), **changes})


def permuted(terms, order):
    """Masks and biases with their positions in this order."""

    def change(letters, array):
        for letter in set(letters) & set("TS"):
            axis = letters.index(letter)
            array = array if array.shape[axis] == 1 else np.take(array, order, axis)
        return array

    return {name: map_arrays(change, term) if term is not None else None for name, term in terms.items()}


def test_no_mesh_changes_a_number(x64):
    shapes = [(B, T, H, K), (B, T, H, K), (B, H, T)]
    for mesh, options in CALLS.items():
        options = dict(options)
        groups = options.pop("groups")
        axes = axes_of(mesh, **{name: options.pop(name) for name in ("order", "method") if name in options})
        q, d_out, d_lse = (RNG.normal(size=shape) for shape in shapes)
        k, v = (RNG.normal(size=(B, T, groups, K)) for _ in range(2))
        order = zigzag_order(T, 2) if axes.order == "zigzag" else np.arange(T)
        back = np.argsort(order)
        sinks = options.pop("sinks", None)
        spread = permuted(options, order)
        wanted = jax.jit(results(functools.partial(attention, impl="reference")))(
            q, k, v, {**options, "sinks": sinks}, d_out, d_lse
        )
        found = jax.jit(results(functools.partial(sharded_attention, axes=axes)))(
            *(x[:, order] for x in (q, k, v)), {**spread, "sinks": sinks}, d_out[:, order], d_lse[:, :, order]
        )
        back_in_order = [np.asarray(x)[:, back] for x in found[0]], np.asarray(found[1])[:, :, back]
        for a, b in zip(
            jax.tree.leaves((*back_in_order, unordered(found[2], back))), jax.tree.leaves(wanted)
        ):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10, err_msg=mesh)


def results(call):
    """Output and gradients of q, k and v; log-sum-exp; gradients of floating arrays among the terms."""

    def run(q, k, v, terms, d_out, d_lse):
        (out, lse), pull = jax.vjp(
            lambda q, k, v, terms: call(q, k, v, return_lse=True, **terms), q, k, v, terms
        )
        dq, dk, dv, d_terms = pull((d_out, d_lse))
        floats = [x for x in jax.tree.leaves(d_terms) if x.dtype != jax.dtypes.float0]
        return [out, dq, dk, dv], lse, floats

    return run


def unordered(gradients, back):
    """Gradients of terms, those of dense biases with positions in natural order."""
    return [np.asarray(x)[:, :, back][..., back] if np.ndim(x) == 4 else x for x in gradients]


def test_rows_and_heads_need_no_collective():
    axes = axes_of("data=2,tensor=4")
    where = jax.sharding.NamedSharding(axes.mesh, jax.sharding.PartitionSpec("data", None, "tensor"))
    rows = jax.sharding.NamedSharding(axes.mesh, jax.sharding.PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((B, T, H, K), "float32", sharding=where)
    ids = jax.ShapeDtypeStruct((B, T), "int32", sharding=rows)

    def gradients(q, ids):
        mask = Causal() & Segments(ids)
        return jax.grad(lambda q, k, v: sharded_attention(q, k, v, axes=axes, mask=mask).sum(), (0, 1, 2))(
            q, q, q
        )

    text = jax.jit(gradients).lower(x, ids).compile().as_text()
    assert not re.findall(r"all-\w+|reduce-scatter|collective-\w+", text)


def test_heads_are_shared_out_and_that_is_logged(caplog):
    share_heads.cache_clear()
    with caplog.at_level("INFO", "modicum.kernels"):
        found = [share_heads(*sizes, ("tensor",), 4).keys for sizes in ((8, 4), (8, 2), (12, 3))]
        assert share_heads(6, 6, ("tensor",), 4) == ((), "split")
    assert found == ["split", "sliced", "repeated"]
    assert "6 heads do not divide over tensor=4: whole everywhere" in caplog.text


def test_rows_are_shared_out_and_that_is_logged_once(caplog):
    share_rows.cache_clear()
    with caplog.at_level("INFO", "modicum.kernels"):
        found = [share_rows(4, (("data", 2), ("pipe", 1), ("fsdp", 4))) for _ in range(3)]
    assert found == [("data",)] * 3
    assert caplog.messages == ["attention: 4 rows do not divide over data×fsdp: not split over the last"]


def test_key_heads_that_no_device_has_alone_are_repeated(x64):
    q, k = RNG.normal(size=(B, 2, 6, K)), RNG.normal(size=(B, 2, 3, K))
    call = jax.jit(lambda q, k: sharded_attention(q, k, k, axes=axes_of("tensor=2"), mask=Full()))
    np.testing.assert_allclose(call(q, k), attention(q, k, k, mask=Full()), rtol=1e-12)


def test_what_cannot_lie_on_a_mesh_is_named():
    class Odd(Mask):
        pass

    with pytest.raises(InputError, match="Odd: nothing says which axes"):
        sharded_attention(*[np.ones((B, T, H, K))] * 3, axes=axes_of("data=2"), mask=Odd())
    with pytest.raises(
        InputError, match="6 queries do not divide into 4 pieces \\(zigzag order over context=2\\)"
    ):
        x = np.ones((B, 6, H, K))
        sharded_attention(x, x, x, axes=axes_of("context=2", order="zigzag"), mask=Full())


@pytest.mark.parametrize("manual", [{"context"}, {"context", "data"}])
def test_zigzag_order_inside_a_shard_map_over_it_is_refused(manual):
    axes = axes_of("data=2,context=2", order="zigzag")
    others = set(axes.mesh.axis_names) - {"context", "data"} if len(manual) > 1 else set()
    inner = jax.shard_map(
        lambda x: sharded_attention(x, x, x, axes=axes, mask=Causal()),
        mesh=axes.mesh,
        in_specs=jax.P(),
        out_specs=jax.P(),
        axis_names=manual | others,
    )
    with pytest.raises(InputError, match="a shard_map around has split context already"):
        jax.eval_shape(inner, np.ones((B, T, H, K)))
