"""The table of chips: every figure has a source, units are right, bad names and shapes are refused in one
line.
"""

import re
from dataclasses import fields

import pytest

from modicum import InputError
from modicum.parallel.mesh import MeshShape
from modicum.parallel.plan import CHIPS, Topology, chip, smaller_slices

FIGURES = ("peak", "memory", "bandwidth", "link", "network", "host", "pcie", "pod", "power", "price")


@pytest.mark.parametrize("name", CHIPS)
def test_every_figure_has_a_source(name):
    one = CHIPS[name]
    sourced = {re.sub(r" \(.*?\)", "", part) for key in one.sources for part in key.split(", ")}
    there = {figure for figure in FIGURES if getattr(one, figure)}
    assert there <= sourced | ({"torus"} if one.torus else set())
    assert sourced <= {field.name for field in fields(one)}


def test_figures_are_in_bytes_and_operations_per_second():
    assert chip("A100-80").peak["bfloat16"] == 312e12
    assert chip("v5p").memory == 95 * 2**30
    assert chip("h100").network * 8 == 400e9  # bits
    assert chip("v100").half == "float16"
    assert "network" in chip("v100").remembered and not chip("v5p").remembered


def test_a_chip_without_units_for_a_type_says_so():
    with pytest.raises(InputError, match="v100 has no fast bfloat16; it has float16"):
        chip("v100").flops("bfloat16")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("v5p", "4x4x4x4", "joined in 3 dimensions"),
        ("v5e", "32x16", "largest slice of v5e has 256"),
        ("v5p", "4xfour", "no shape"),
        ("a100-80", "12", "do not fill hosts of 8"),
        ("v5p", "0x4", "at least 1"),
        ("v5p", "16x20x24", "largest slice of v5p has 6144"),
        ("a100-80", "1x16", "a host of a100-80 has 8, not 16"),
        ("a100-80", "2x2x8", "takes hosts x GPUs of a host, such as 8x8"),
    ],
)
def test_bad_topologies_are_one_line(name, text, message):
    with pytest.raises(InputError, match=message) as error:
        Topology.parse(chip(name), text)
    assert "\n" not in str(error.value)


def test_an_unknown_chip_names_near_ones():
    with pytest.raises(InputError, match=r"'a100-81' is unknown; did you mean a100-80"):
        chip("a100-81")


def test_a_torus_gives_an_axis_the_links_of_the_dimensions_it_spans():
    """scaling-book: 2e11 bytes/s for each wrapped-around dimension of v5p."""
    cube = Topology.parse(chip("v5p"), "4x4x4")
    rates = cube.bandwidths(MeshShape(fsdp=16, tensor=4))
    assert rates["tensor"] == pytest.approx(2e11)
    assert rates["fsdp"] == pytest.approx(4e11)
    small = Topology.parse(chip("v5e"), "4x4")  # too small to wrap around
    assert small.bandwidths(MeshShape(fsdp=16))["fsdp"] == pytest.approx(1e11)


def test_hosts_have_the_switch_inside_and_the_network_between():
    hosts = Topology.parse(chip("a100-80"), "4x8")
    rates = hosts.bandwidths(MeshShape(data=4, tensor=8))
    assert rates == {"tensor": 300e9, "data": 25e9}
    assert (
        hosts.bandwidths(MeshShape(fsdp=32))["fsdp"] == 200e9
    )  # all eight of a host share the ring's way out


def test_hosts_have_as_many_gpus_as_were_given():
    lone = Topology.parse(chip("a100-80"), "64x1")
    assert lone.bandwidths(MeshShape(fsdp=64))["fsdp"] == 25e9
    fours = Topology.parse(chip("a100-80"), "2x4").bandwidths(MeshShape(fsdp=2, tensor=4))
    assert fours == {"tensor": 300e9, "fsdp": 25e9}


@pytest.mark.parametrize(
    ("shape", "links"), [("4x4x4", 6), ("4x4x8", 6), ("2x2x4", 3), ("4x4x6", 3), ("4x4", 2)]
)
def test_only_whole_cubes_wrap_around(shape, links):
    """One link a dimension where it does not, as in 2x2x4 of v4, which is no cube."""
    found = Topology.parse(chip("v4"), shape)
    assert found.bandwidths(MeshShape(fsdp=found.size))["fsdp"] == pytest.approx(45e9 * links)


def test_slices_grow_by_two():
    sizes = [one.size for one in smaller_slices(chip("v5e"))]
    assert sizes == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert smaller_slices(chip("v5p"))[-1].size == 4096  # 8192 would be more than a job can have
