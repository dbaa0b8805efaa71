"""The search: fills the devices, keeps the budget, is monotone in it, and refuses what cannot be in one
line.
"""

from dataclasses import replace

import pytest

from modicum import InputError
from modicum.parallel.mesh import MeshShape
from modicum.parallel.plan import Assumptions, Search, Topology, chip

EIGHT = Topology.parse(chip("a100-40"), "8")


def with_memory(topology, size):
    return Topology(replace(topology.chip, memory=size), topology.shape)


def test_plans_fill_the_devices_and_keep_the_budget(job):
    plans = Search().plans(job, EIGHT)
    assert all(plan.split.mesh.size == 8 for plan in plans)
    assert all(plan.memory.total <= 0.95 * EIGHT.chip.memory for plan in plans)
    assert [p.time.total for p in plans] == sorted(p.time.total for p in plans)
    assert len({str(plan.split.mesh) for plan in plans}) > 5
    assert all(len(plan.choices) == 8 for plan in plans)


def test_more_memory_is_never_slower_and_recomputes_no_more(job):
    best = []
    for size in (0.6e9, 0.8e9, 1e9, 2e9, 8e9, 40e9):
        try:
            best.append(Search().plans(job, with_memory(EIGHT, size))[0].time.total)
        except InputError:
            best.append(float("inf"))
    assert best == sorted(best, reverse=True)
    assert best[-1] < float("inf")


def test_offloading_only_adds_ways(job):
    tight = with_memory(EIGHT, 1e9)
    with_host = Search(offload=True).plans(job, tight)[0]
    assert with_host.time.total <= Search().plans(job, tight)[0].time.total


def test_an_impossible_budget_says_what_would_do(job):
    two = with_memory(Topology.parse(chip("a100-40"), "1"), 0.5e9)
    with pytest.raises(
        InputError, match=r"does not fit 1 a100-40: .* GiB a device.*smallest slice .* is \d+"
    ) as error:
        Search().plans(job, two)
    assert "\n" not in str(error.value)
    named = int(str(error.value).split(" is ")[1].split()[0])
    assert Search().smallest(job, two.chip).topology.size == named
    smaller = Topology(two.chip, (named // 2,))
    with pytest.raises(InputError):
        Search().plans(job, smaller)


def test_no_slice_at_all_says_so(job):
    tiny = with_memory(Topology.parse(chip("a100-40"), "1"), 1e3)
    with pytest.raises(InputError, match="no slice of a100-40 would do"):
        Search().plans(job, tiny)


@pytest.mark.parametrize(
    ("search", "batch", "message"),
    [
        (Search(axes=("tensor",)), 64, r"tensor=32 does not divide heads=16"),
        (Search(axes=("data",)), 33, r"data x fsdp = 32 does not divide batch=33"),
        (Search(mesh=MeshShape(data=4)), 64, "mesh data=4 needs 4 devices, topology 32 has 32"),
        (Search(remats=("some",)), 64, "knows none of these"),
        (Search(accumulate=5), 64, "cannot be cut into micro-batches"),
    ],
)
def test_what_does_not_divide_is_one_line(job, search, batch, message):
    with pytest.raises(InputError, match=message) as error:
        search.plans(replace(job, batch=batch), Topology.parse(chip("a100-40"), "32"))
    assert "\n" not in str(error.value)


def test_what_is_offloaded_fits_the_host(job):
    """Of a device with room for little, the host takes as many layers as it has room for, and no more."""
    tight = with_memory(EIGHT, 0.7e9)
    roomy = Search(offload=True, accumulate=4).plans(job, tight)[0]
    assert any("+offload" in name for name in roomy.choices) or roomy.split.offload
    assert 0 < roomy.memory.host <= Assumptions().host
    for host in (0.0, 5e7):
        plans = Search(offload=True, accumulate=4, assume=Assumptions(host=host)).plans(job, tight)
        assert all(plan.memory.host <= host for plan in plans)
