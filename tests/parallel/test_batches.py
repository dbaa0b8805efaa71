import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from modicum import InputError
from modicum.parallel import Layout, MeshShape, batch_sharding, local_rows, make_mesh, place_batch
from modicum.parallel.batches import fitting_rows, on_host


def batch(rows=8, length=6):
    tokens = np.arange(rows * length, dtype=np.int32).reshape(rows, length)
    return {"tokens": tokens, "label": np.arange(rows, dtype=np.int32), "step": np.int32(3)}


def test_rows_lie_over_data_and_fsdp_and_length_over_context():
    mesh = make_mesh(MeshShape(data=2, fsdp=2, context=2))
    assert batch_sharding(mesh).spec == PartitionSpec(("data", "fsdp"), "context")
    assert batch_sharding(mesh, 1).spec == PartitionSpec(("data", "fsdp"))
    placed = place_batch(batch(), mesh)
    assert {shard.data.shape for shard in placed["tokens"].addressable_shards} == {(2, 3)}
    assert {shard.data.shape for shard in placed["label"].addressable_shards} == {(2,)}
    assert placed["step"].sharding.is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(placed), batch())


def test_layout_says_where_placing_puts_it():
    layout = Layout(make_mesh(MeshShape(data=4, tensor=2)))
    placed = layout.place(batch())
    assert jax.tree.map(lambda leaf: leaf.sharding, placed) == layout.batch(batch())


def test_one_process_provides_all_rows():
    mesh = make_mesh(MeshShape(data=4, tensor=2))
    assert local_rows(16, mesh) == slice(0, 16)
    assert local_rows(5, make_mesh(MeshShape(tensor=8))) == slice(0, 5)


def test_indivisible_batches_are_named():
    mesh = make_mesh(MeshShape(data=2, fsdp=2, context=2))
    with pytest.raises(
        InputError, match=r"^batch\['label'\] of shape \(6,\): 6 rows .* 4 blocks \(data×fsdp\).* as 8$"
    ):
        place_batch({"label": np.zeros(6)}, mesh)
    with pytest.raises(InputError, match=r"^the batch: 10 rows do not divide into 4 blocks .* such as 12$"):
        local_rows(10, mesh)
    with pytest.raises(
        InputError, match=r"\['tokens'\] of shape \(8, 5\): length 5 .* context=2; pad it to 6$"
    ):
        place_batch({"tokens": np.zeros((8, 5))}, mesh)


def test_rows_are_rounded_up_to_what_divides():
    mesh = make_mesh(MeshShape(data=3), jax.devices()[:3])
    assert [fitting_rows(rows, mesh) for rows in (1, 3, 64)] == [3, 3, 66]


def test_arrays_come_back_whole():
    whole = batch()
    layout = Layout(make_mesh(MeshShape(data=4, context=2)))
    back = on_host(layout.place(whole))
    assert all(isinstance(leaf, np.ndarray | np.generic) for leaf in jax.tree.leaves(back))
    jax.tree.map(np.testing.assert_array_equal, back, whole)
