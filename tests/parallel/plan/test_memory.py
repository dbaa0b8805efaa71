"""Bytes of a device: each of ZeRO's formulas, what tensor parallelism splits, what a pipeline holds."""

from dataclasses import replace

import pytest

from modicum.parallel.mesh import MeshShape
from modicum.parallel.plan import RECIPES, Layer, LayerTable, Remat, Split, fixed_memory
from modicum.parallel.plan.memory import held_numbers

MIXED = RECIPES["mixed"]


def billion(parameters=1_000_000_000):
    """One layer whose numbers can all be split and that keeps nothing."""
    one = Layer("layer", parameters, parameters, 0.0, 0.0, (Remat("none", 0.0, 0.0, 0.0),))
    return LayerTable("billion", (one,), (), 0.0)


@pytest.mark.parametrize(
    ("zero", "states"),
    [(0, 16.0), (1, 2 + 2 + 12 / 64), (2, 2 + 14 / 64), (3, 16 / 64)],
)
def test_zero_divides_states_as_the_paper_says(zero, states):
    """Rajbhandari et al. 2020, figure 1: 16 bytes a parameter over 64 copies."""
    memory = fixed_memory(billion(), MIXED, Split(MeshShape(data=64), zero), 64, 1)
    held = memory.parameters + memory.gradients + memory.optimizer
    assert held == pytest.approx(states * 1e9)


def test_the_papers_example_of_7_5_billion():
    """Same figure: 120, 31.4, 16.6 and 1.9 GB."""
    seven = billion(7_500_000_000)
    held = []
    for zero in range(4):
        memory = fixed_memory(seven, MIXED, Split(MeshShape(data=64), zero), 64, 1)
        held.append(round((memory.parameters + memory.gradients + memory.optimizer) / 1e9, 1))
    assert held == [120.0, 31.4, 16.6, 1.9]


def test_fsdp_splits_at_any_level():
    data = fixed_memory(billion(), MIXED, Split(MeshShape(data=8), 3), 8, 1)
    fsdp = fixed_memory(billion(), MIXED, Split(MeshShape(fsdp=8), 0), 8, 1)
    assert data == fsdp


def test_offloaded_state_is_the_hosts():
    here = fixed_memory(billion(), MIXED, Split(MeshShape(fsdp=8)), 8, 1)
    away = fixed_memory(billion(), MIXED, Split(MeshShape(fsdp=8), offload=True), 8, 1)
    assert away.host == here.optimizer and away.total == here.total - here.optimizer


def test_tensor_leaves_norms_whole(table):
    whole, _ = held_numbers(table, MeshShape())
    split, _ = held_numbers(table, MeshShape(tensor=4))
    norms = sum(one.parameters - one.split_parameters for one in table.layers)
    assert split == (whole - norms) / 4 + norms


def test_the_fullest_stage_counts(table):
    """Eight layers over three stages: three layers and the embedding."""
    held, _ = held_numbers(table, MeshShape(pipe=3))
    assert held == 3 * table.layers[0].parameters + table.ends[0].parameters


def test_activations_are_those_of_a_micro_batch(table):
    one = Split(MeshShape(data=4, tensor=2, context=2), accumulate=2)
    assert one.tokens(64, 1024) == 64 * 1024 / (4 * 2 * 2)
    assert replace(one, mesh=MeshShape(pipe=4), accumulate=8).in_flight == 4
    assert replace(one, mesh=MeshShape(pipe=4), accumulate=8, interleave=2).in_flight == 4 * (1 + 3 / 8)


def test_a_gathered_table_counts_where_it_is_larger_than_two_layers(table):
    big = replace(table.ends[0], parameters=2**28, split_parameters=2**28)
    split = Split(MeshShape(fsdp=8))
    small_end, big_end = (
        fixed_memory(each, MIXED, split, 8, 1).temporaries for each in (table, replace(table, ends=(big,)))
    )
    layer = table.layers[0].parameters
    assert big_end - small_end == 2 * (2**28 - 2 * layer) + 2 * (2**28 - layer)


def test_accumulating_holds_gradients_twice():
    alone = fixed_memory(billion(), MIXED, Split(MeshShape()), 8, 1)
    parts = fixed_memory(billion(), MIXED, Split(MeshShape(), accumulate=8), 8, 1)
    assert parts.temporaries - alone.temporaries == parts.gradients
