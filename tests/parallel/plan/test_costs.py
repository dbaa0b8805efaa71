"""Seconds of a step: bytes over each axis by formula, roofline of compute, what hides and what does not."""

from dataclasses import replace

import pytest

from modicum.parallel.mesh import MeshShape
from modicum.parallel.plan import Assumptions, Split, Topology, chip, communication_bytes, step_time

ONE = Assumptions(efficiency=1.0, overlap=0.0)


def sent(job, zero=0, accumulate=1, **mesh):
    return communication_bytes(job, Split(MeshShape(**mesh), zero, accumulate))


@pytest.mark.parametrize(
    ("zero", "passes"),
    [(0, 2 + 2), (1, 2 + 2), (2, 2 + 2), (3, 2 + 2 + 2)],
)
def test_data_parallel_bytes(job, zero, passes):
    """In bytes a parameter with 16-bit gradients and parameters: ZeRO 3 sends half as much again (the
    paper's 1.5).
    """
    assert sent(job, zero, data=8)["data"] == pytest.approx(passes * job.table.parameters * 7 / 8)


def test_gradients_and_parameters_are_sent_in_their_own_types(job):
    """Gradients of 4 bytes: twice themselves, or once beside parameters of 2 (ZeRO 3: those twice)."""
    wide = replace(job, recipe=replace(job.recipe, gradient=4))
    parameters = job.table.parameters * 7 / 8
    found = [sent(wide, zero, data=8)["data"] / parameters for zero in range(4)]
    assert found == pytest.approx([4 + 4, 4 + 2, 4 + 2, 2 + 2 + 4])


def test_accumulating_repeats_what_zero_2_and_3_send(job):
    parameters = job.table.parameters * 7 / 8
    assert sent(job, 0, 4, data=8) == sent(job, 0, 1, data=8)
    assert sent(job, 2, 4, data=8)["data"] == pytest.approx((2 * 4 + 2) * parameters)
    assert sent(job, 3, 4, data=8)["data"] == pytest.approx(4 * 6 * parameters)


def test_tensor_sums_the_stream_four_times_a_layer(job):
    """Shoeybi et al. 2019: two all-reduces forward, two backward, of b x s x h each."""
    stream = 2 * 1024 * job.tokens
    assert sent(job, tensor=4)["tensor"] == pytest.approx(8 * 4 * stream * 2 * 3 / 4)


def test_fsdp_and_data_together_send_gradients_in_two_rounds(job):
    both = sent(job, data=2, fsdp=4)
    assert both["data"] == pytest.approx(4 * job.table.parameters / 4 / 2)


def test_context_passes_keys_round(job):
    ring = 3 * 3 * 8 * 4096 * job.tokens / 4
    gradients = 2 * 2 * job.table.parameters * 3 / 4
    assert sent(job, context=4)["context"] == pytest.approx(ring + gradients)


def test_compute_is_a_roofline(job):
    """One chip, many tokens: 3 forward passes of operations over the peak; few tokens: weights over the
    bandwidth.
    """
    single = Topology.parse(chip("a100-80"), "1")
    full = step_time(job, single, Split(MeshShape()), ONE)
    assert full.compute == pytest.approx(3 * 2 * 12 * 1024**2 * 8 * job.tokens / 312e12)
    few = step_time(replace(job, batch=1, length=8), single, Split(MeshShape()), ONE)
    assert few.compute == pytest.approx(3 * 2 * job.table.parameters / 2039e9, rel=1e-3)


def test_what_hides_behind_compute_costs_nothing(job):
    eight = Topology.parse(chip("a100-80"), "8")
    split = Split(MeshShape(fsdp=8))
    hidden = step_time(job, eight, split, Assumptions(efficiency=0.001, overlap=1.0))
    assert hidden.exposed == 0 and hidden.moved > 0
    shown = step_time(job, eight, split, ONE)
    assert shown.exposed == pytest.approx(shown.moved)


def test_the_bubble_is_the_pipelines_idle_share(job):
    topology = Topology.parse(chip("a100-80"), "4")
    split = Split(MeshShape(pipe=4), accumulate=8)
    time = step_time(job, topology, split, ONE)
    assert time.bubble == pytest.approx(3 / 8 * (time.compute + time.memory + time.exposed))
    parts = step_time(job, topology, replace(split, interleave=3), ONE)
    assert parts.bubble == pytest.approx(3 / 8 / 3 * (parts.compute + parts.memory + parts.exposed))
    assert parts.communication["pipe"] == pytest.approx(3 * time.communication["pipe"])


def test_the_head_is_the_last_stages(job):
    """Eight layers over four stages and a head as costly as a layer: the last stage computes three."""
    one = replace(job.table.layers[0], name="head", traffic=0.0)
    headed = replace(job, table=replace(job.table, ends=(*job.table.ends, one)))
    topology, split = Topology.parse(chip("a100-80"), "4"), Split(MeshShape(pipe=4), accumulate=8)
    without, with_head = (step_time(each, topology, split, ONE).compute for each in (job, headed))
    assert with_head == pytest.approx(without * 3 / 2)
    uneven, split = replace(split, mesh=MeshShape(pipe=3)), replace(split, mesh=MeshShape(pipe=3))
    three = Topology.parse(chip("a100-80"), "3")  # three, three and two layers: the head fills the last
    assert step_time(headed, three, uneven, ONE).compute == pytest.approx(
        step_time(job, three, split, ONE).compute
    )


def test_what_is_sent_once_a_step_hides_behind_one_micro_batch(job):
    eight, all_hides = Topology.parse(chip("a100-80"), "8x1"), Assumptions(efficiency=1.0, overlap=1.0)
    for zero in (0, 1):
        split = Split(MeshShape(data=8), zero, accumulate=8)
        time = step_time(job, eight, split, all_hides)
        assert time.exposed == pytest.approx(max(0.0, time.moved - time.compute / 8))
        assert time.exposed > 0
    each = step_time(job, eight, Split(MeshShape(data=8), 2, accumulate=8), all_hides)
    assert each.exposed == pytest.approx(max(0.0, each.moved - each.compute))
