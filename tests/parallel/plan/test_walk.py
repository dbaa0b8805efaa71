"""Compiled programs walked: every expected number is counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from modicum import InputError
from modicum.parallel.mesh import MESH_AXES, MeshShape, make_mesh
from modicum.parallel.plan.groups import members
from modicum.parallel.plan.hlo import Program, parse_instruction
from modicum.parallel.plan.walk import walk

ONE = dict.fromkeys(MESH_AXES, 1)

# A loop of 5 trips: a product of [8,16] and [16,16], 8 rows of a stack of 5 read, a sum over two devices.
LOOP = """HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (given: (s32[], f32[8,16], f32[5,16,16])) -> (s32[], f32[8,16], f32[5,16,16]) {
  %given = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, /*index=2*/f32[5,16,16]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%given), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[8,16]{1,0} get-tuple-element(%given), index=1
  %stack = f32[5,16,16]{2,1,0} get-tuple-element(%given), index=2
  %zero = s32[] constant(0)
  %row = f32[1,16,16]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,16,16}
  %weight = f32[16,16]{1,0} bitcast(%row)
  %y = f32[8,16]{1,0} dot(%x, %weight), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %z = f32[8,16]{1,0} all-reduce(%y), channel_id=1, replica_groups=[2,2]<=[4], to_apply=%add
  ROOT %out = (s32[], f32[8,16]{1,0}, f32[5,16,16]{2,1,0}) tuple(%next, %z, %stack)
}

%more (given.1: (s32[], f32[8,16], f32[5,16,16])) -> pred[] {
  %given.1 = (s32[], f32[8,16]{1,0}, f32[5,16,16]{2,1,0}) parameter(0)
  %j = s32[] get-tuple-element(%given.1), index=0
  %limit = s32[] constant(LIMIT)
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (x.1: f32[8,16], stack.1: f32[5,16,16]) -> f32[8,16] {
  %x.1 = f32[8,16]{1,0} parameter(0)
  %stack.1 = f32[5,16,16]{2,1,0} parameter(1)
  %start = s32[] constant(START)
  %init = (s32[], f32[8,16]{1,0}, f32[5,16,16]{2,1,0}) tuple(%start, %x.1, %stack.1)
  %loop = (s32[], f32[8,16]{1,0}, f32[5,16,16]{2,1,0}) while(%init), condition=%more, body=%body
  ROOT %result = f32[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""


def loop(start="0", limit="5"):
    return LOOP.replace("START", start).replace("LIMIT", limit)


@pytest.mark.parametrize(("start", "limit", "trips"), [("0", "5", 5), ("2", "5", 3), ("7", "5", 0)])
def test_a_loop_counts_each_of_its_trips(start, limit, trips):
    found = walk(loop(start, limit), ONE | {"data": 2, "tensor": 2})
    assert found.flops == trips * 2 * 8 * 16 * 16
    assert not found.unknown
    # counter: two numbers read, one written; slice: read and written; product: x, weight, y; 4 bytes each
    assert found.bytes == trips * 4 * (3 + 2 * 16 * 16 + 8 * 16 + 16 * 16 + 8 * 16)
    assert found.sent() == {("all-reduce", ("tensor",)): (trips, trips * 2 * 0.5 * 4 * 8 * 16)}
    merged = found.merged()
    assert (merged.flops, merged.bytes, merged.sent()) == (found.flops, found.bytes, found.sent())


def test_a_loop_of_unknown_trips_is_named_and_counts_once():
    unknown = loop().replace(
        "%limit = s32[] constant(5)", "%limit = s32[] get-tuple-element(%given.1), index=0"
    )
    found = walk(unknown, ONE | {"data": 2, "tensor": 2})
    assert found.unknown == ["loop"] and found.flops == 2 * 8 * 16 * 16


def test_xlas_own_note_of_trips_is_believed():
    noted = loop(limit="%unknown").replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
    )
    assert walk(noted, ONE | {"data": 2, "tensor": 2}).flops == 7 * 2 * 8 * 16 * 16


def test_a_product_that_a_tpu_writes_as_a_dilated_convolution():
    lines = """ENTRY %main (q: f32[4,6,256,64], k: f32[4,6,256,64]) -> f32[4,6,256,256] {
  %q = f32[4,6,256,64]{3,2,1,0} parameter(0)
  %k = f32[4,6,256,64]{3,2,1,0} parameter(1)
  ROOT %s = f32[4,6,256,256]{2,3,1,0:T(8,128)S(1)} convolution(%q, %k), WINDOW, dim_labels=01bf_01oi->01bf
}
"""
    batched = "window={size=4x6 stride=3x5 lhs_dilate=4x6}"
    found = walk("HloModule m\n\n" + lines.replace("WINDOW", batched), ONE)
    assert found.flops == 2 * 4 * 6 * 256 * 256 * 64
    assert found.bytes == 4 * 2 * 4 * 6 * 256 * 64  # the scores stay on the chip


def test_a_padded_convolution_counts_only_what_its_window_meets():
    text = """HloModule m

ENTRY %main (x: f32[2,5,3], w: f32[3,3,7]) -> f32[2,5,7] {
  %x = f32[2,5,3]{2,1,0} parameter(0)
  %w = f32[3,3,7]{2,1,0} parameter(1)
  ROOT %y = f32[2,5,7]{2,1,0} convolution(%x, %w), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f
}
"""
    assert walk(text, ONE).flops == 2 * 2 * 7 * 3 * 13  # 5 places of 3, of which 2 lie in the padding


@pytest.mark.parametrize(
    ("groups", "size", "axes"),
    [
        ("replica_groups=[2,4]<=[8]", 4, ("fsdp", "tensor")),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", 2, ("fsdp",)),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", 2, ("data",)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", 4, ("fsdp", "tensor")),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", 2, ("tensor",)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}", 4, ("data", "fsdp")),
        ("replica_groups={}", 8, ("data", "fsdp", "tensor")),
    ],
)
def test_groups_are_mesh_axes(groups, size, axes):
    line = f"  %x = f32[8] all-reduce(%y), channel_id=1, {groups}, use_global_device_ids=true, to_apply=%add"
    one, is_root = parse_instruction(line)
    assert members(one, ONE | {"data": 2, "fsdp": 2, "tensor": 2}) == (size, axes) and not is_root


def test_a_permutation_lies_on_the_axes_it_crosses():
    line = "  %x = f32[8] collective-permute(%y), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}"
    assert members(parse_instruction(line)[0], {"data": 2, "tensor": 2}) == (2, ("tensor",))


def test_collectives_of_any_kind_may_be_started_and_done():
    text = """HloModule m

%scatter (x.1: f32[8,4]) -> f32[2,4] {
  %x.1 = f32[8,4]{1,0} parameter(0)
  ROOT %part.1 = f32[2,4]{1,0} reduce-scatter(%x.1), replica_groups={}, dimensions={0}, to_apply=%add
}

ENTRY %main (x: f32[8,4]) -> (f32[2,4], f32[2,4], f32[8,4]) {
  %x = f32[8,4]{1,0} parameter(0)
  %a = ((f32[8,4]{1,0}), f32[2,4]{1,0}) reduce-scatter-start(%x), replica_groups={}, to_apply=%add
  %b = f32[2,4]{1,0} reduce-scatter-done(%a)
  %c = ((f32[8,4]{1,0}), f32[2,4]{1,0}, s32[]) async-start(%x), calls=%scatter
  %d = f32[2,4]{1,0} async-done(%c)
  %e = ((f32[2,4]{1,0}), f32[8,4]{1,0}) all-gather-start(%d), replica_groups={}, dimensions={0}
  %f = f32[8,4]{1,0} all-gather-done(%e)
  ROOT %out = (f32[2,4]{1,0}, f32[2,4]{1,0}, f32[8,4]{1,0}) tuple(%b, %d, %f)
}
"""
    found = walk(text, ONE | {"data": 4})
    share = 3 / 4 * 4 * 8 * 4
    assert found.sent() == {
        ("reduce-scatter", ("data",)): (2, 2 * share),
        ("all-gather", ("data",)): (1, share),
    }
    assert all(one.background for one in found.collectives) and not found.bytes


def test_a_compiled_scan_over_a_mesh(quick_compile):
    layers, rows, width = 6, 32, 64
    mesh = make_mesh(MeshShape(fsdp=2, tensor=4))
    place = lambda *names: NamedSharding(mesh, PartitionSpec(*names))  # noqa: E731
    x = jax.ShapeDtypeStruct((rows, width), jnp.float32, sharding=place("fsdp"))
    stack = jax.ShapeDtypeStruct((layers, width, width), jnp.float32, sharding=place(None, "tensor"))

    def run(x, stack):
        def layer(x, weight):
            x = jax.lax.with_sharding_constraint(x, place("fsdp", "tensor"))
            return jax.lax.with_sharding_constraint(x @ weight, place("fsdp")), None

        return jax.lax.scan(layer, x, stack)[0]

    text = jax.jit(run, out_shardings=place("fsdp")).lower(x, stack).compile().as_text()
    found = walk(text, mesh.shape)
    assert found.flops == layers * 2 * (rows // 2) * (width // 4) * width
    rows_whole = (rows // 2) * width * 4
    assert found.sent() == {
        ("all-reduce", ("tensor",)): (layers, layers * 2 * 3 / 4 * rows_whole),
        ("all-gather", ("tensor",)): (1, 3 / 4 * rows_whole),  # what leaves the loop is split over tensor
    }


def test_what_is_no_program_is_refused():
    with pytest.raises(InputError, match="no HLO module"):
        Program.parse("HloModule nothing\n")
    with pytest.raises(InputError, match="no HLO instruction: 'ROOT'"):
        parse_instruction("  ROOT")
