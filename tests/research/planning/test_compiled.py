"""A plan's train step compiled for a TPU that is not there, beside the plan."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from modicum import InputError
from modicum.experiments.commands import parse
from modicum.experiments.commands.train import Train
from modicum.models.presets import preset
from modicum.parallel.mesh import MeshShape
from modicum.parallel.plan import Job, Search, Topology, chip, recipe
from modicum.research.planning.compiled import trained_remat
from modicum.research.planning.proof import train_command
from modicum.research.planning.tables import layer_table


class Chosen:
    """What of a plan the rounding reads."""

    def __init__(self, *choices):
        self.choices = choices


@pytest.mark.parametrize(
    ("choices", "text"),
    [
        (("full",) * 96, "full"),
        (("none",) * 32 + ("dots",) * 64, "none:24,dots:72"),  # parts of 12 layers
        (("none",) * 5 + ("full",) * 1, "none:5,full:1"),
        (("none",) * 47 + ("full",) * 1, "none:42,full:6"),
        (("none", "dots", "full", "none"), "none:2,dots:1,full:1"),
        (("full+offload", "full+offload", "full", "full"), "full:2,offload:2"),
    ],
)
def test_choices_are_rounded_to_shares_that_keep_no_more(choices, text):
    assert trained_remat(Chosen(*choices)) == text


def test_what_training_cannot_send_to_the_host_is_refused():
    with pytest.raises(InputError, match=r"no remat dots\+offload; plan without --offload"):
        trained_remat(Chosen("dots+offload", "dots+offload", "full", "none"))


def test_the_command_names_all_that_was_chosen():
    each = recipe("modicum")
    job = Job(layer_table(preset("ladder-1b"), 1024, each), each, 64, 1024)
    search = Search(mesh=MeshShape(fsdp=4), accumulate=2, offload=True)
    plan = search.plans(job, Topology.parse(chip("v5e"), "2x2"))[0]
    plan = replace(plan, split=replace(plan.split, offload=True))
    said = train_command("ladder-1b", plan, job)
    name, *arguments = said.split()
    read = parse(arguments)
    assert name == "modicum" and isinstance(read, Train)
    assert (read.preset, read.length, read.scan, read.offload) == ("ladder-1b", 1024, True, True)
    assert read.remat == trained_remat(plan)
    assert (read.training.batch, read.training.accumulate, read.training.precision) == (64, 2, "bf16")
    assert (read.placement.mesh, read.placement.zero) == ("fsdp=4", 0)
    stages = replace(plan, split=replace(plan.split, mesh=MeshShape(pipe=2, fsdp=2)))
    read = parse(train_command("ladder-1b", stages, job).split()[1:])
    assert (read.placement.micro_batches, read.training.accumulate) == (2, 1)


@pytest.mark.tpu_aot
def test_a_compiled_step_is_within_a_tenth_of_its_plan():
    paths = [os.environ.get("MODICUM_LIBTPU"), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "JAX_PLATFORMS": "cpu"}
    given = [sys.executable, "-m", "modicum", "study", "planner-compiled", "--smoke"]
    done = subprocess.run(given, env=environment, capture_output=True, text=True, check=False)
    if "pip install libtpu" in done.stderr:
        pytest.skip("libtpu is not here (or set MODICUM_LIBTPU)")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "(0 of unknown trips)" in done.stdout
    assert "within 10%: **1 of 1**" in done.stdout
