"""Predictions of published runs: near enough, each in its own convention, and held out of its own fit."""

import statistics

import pytest

from modicum.parallel.plan import Assumptions
from modicum.research.planning.published import RUNS
from modicum.research.planning.validation import Case, asked_efficiency, counted_flops, predict

WITH_MESH = [run for run in RUNS if run.mesh and not run.name.startswith("PaLM")]


@pytest.fixture(scope="module")
def found():
    return predict(WITH_MESH)


def test_runs_whose_mesh_is_known_are_predicted_within_a_fifth(found):
    assert len(found) == 3
    assert all(abs(one.error) < 0.2 for one in found), [(one.run.name, one.error) for one in found]
    assert all(str(one.plan.split.mesh) == one.run.mesh for one in found)


def test_a_run_has_no_say_in_its_held_out_prediction(found):
    one = found[0]
    others = statistics.median(other.asked for other in found[1:])
    assert one.held_out == pytest.approx(one.mfu * others / Assumptions().efficiency, rel=0.1)
    assert one.held_out != pytest.approx(one.mfu, rel=1e-3)


def test_with_the_efficiency_it_asks_for_a_run_is_predicted_exactly(found):
    case = Case.of(WITH_MESH[0])
    asked = Assumptions(efficiency=asked_efficiency(case, found[0].plan, Assumptions()))
    assert case.mfu(case.plan(asked)) == pytest.approx(WITH_MESH[0].figure, rel=0.01)


def test_conventions_differ_by_attentions_products():
    run = next(run for run in RUNS if run.convention == "whole")
    heads = run.config.attention.heads * run.config.attention.width_of_head(run.config.width)
    assert counted_flops(run) - 6 * run.parameters == 12 * run.config.layers * heads * run.length
