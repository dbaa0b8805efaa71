"""A plan's proof: the train step itself compiled ahead of time for chips that are not here.

What `modicum train` would run (`research.training.program`, on a layout of the plan's mesh and ZeRO level) is
traced for shapes and handed to the compiler of the topology, which says what each device needs; the
compiled program is then walked (`parallel.plan.walk`) for its operations, bytes and collectives.
"""

from __future__ import annotations

import math
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ... import InputError
from ...models.config import TransformerConfig
from ...models.precision import policy
from ...models.remat import NAMES, remat_text
from ...models.transformer import Transformer
from ...parallel.layout import Layout
from ...parallel.mesh import MESH_AXES, make_mesh
from ...parallel.plan import Assumptions, Plan, Topology
from ...parallel.plan.memory import Split
from ...parallel.plan.walk import Walked, walk
from ..training.config import TrainingConfig
from ..training.loss_scale import NO_SCALING
from ..training.program import lower_step
from ..training.tasks import language_model_job
from .tables import VOCAB_MULTIPLE

STEPS = 8  # layers of a scan's step at most
FINAL = "after_codegen.txt"  # how libtpu calls the last form of a module
EXHAUSTED = re.compile(
    r"Used [\d.]+[KMGT] of [\d.]+[KMGT] hbm"
    r"|total memory required .*\([\d.]+[KMGT]\) exceeds available HBM \([\d.]+[KMGT]\)"
)
ROW = ("tokens", "targets", "segments", "positions")


@dataclass(frozen=True)
class Proof:
    """What the compiler says of a step, bytes on each device.

    aliased  of the arguments, what the outputs take over (the state);  host: in the host's memory
    code     of the program itself;  walked: what the compiled program does
    """

    arguments: float
    outputs: float
    aliased: float
    temporaries: float
    host: float
    code: float
    walked: Walked

    @property
    def total(self) -> float:
        """Bytes of a device's memory while the step runs: arguments, temporaries, and new outputs."""
        return self.arguments + self.temporaries + self.outputs - self.aliased

    def time(self, topology: Topology, split: Split, assume: Assumptions) -> ProofTime:
        """The roofline time of what the program does, under the assumptions of a plan."""
        chip = topology.chip
        rate = chip.flops(chip.half) * assume.efficiency
        own = self.walked.seconds(rate, chip.bandwidth, chip.pcie)
        links = topology.bandwidths(split.mesh)
        waiting, beside = 0.0, 0.0
        for one in self.walked.collectives:
            slowest = min((links[axis] for axis in one.axes if axis in links), default=math.inf)
            seconds = one.total / slowest
            if one.background:
                beside += seconds
            else:
                waiting += seconds
        return ProofTime(own, waiting, beside, max(0.0, beside - assume.overlap * own))


@dataclass(frozen=True)
class ProofTime:
    """Seconds of a step by its compiled program: on the chip, collectives that it waits for, those computed
    beside other work, and what of these cannot hide.
    """

    own: float
    waiting: float
    beside: float
    exposed: float

    @property
    def total(self) -> float:
        """Seconds."""
        return self.own + self.waiting + self.exposed


class Elsewhere(Layout):
    """A layout over devices that belong to no process here: it lays out, and nothing is fed to it."""

    def local_rows(self, rows: int) -> slice:
        """All, as of a single process."""
        return slice(0, rows)


def trained_config(config: TransformerConfig, remat: str, length: int) -> TransformerConfig:
    """The configuration as `modicum train` would run it: scanned, in bfloat16, its vocabulary padded."""
    multiple = math.lcm(config.vocab_multiple, VOCAB_MULTIPLE)
    config.positions.require(length)
    return replace(config, vocab_multiple=multiple, scan=True, remat=remat, precision=policy("bf16"))


def trained_remat(plan: Plan) -> str:
    """What `modicum train --remat` calls the choices of a plan.

    A scan's step has layers of each policy's share, so shares are rounded to parts of at most `STEPS`, up
    for what keeps less: the step then takes less memory than the plan, not more. Raises InputError where a
    layer sends to the host what another policy than full keeps.
    """
    choices = ["offload" if name == "full+offload" else name for name in plan.choices]
    if unknown := sorted(set(choices) - set(NAMES)):
        raise InputError(f"`modicum train` has no remat {' or '.join(unknown)}; plan without --offload")
    layers = len(choices)
    parts = max(size for size in range(1, STEPS + 1) if layers % size == 0)
    unit, left, runs = layers // parts, layers, list[str]()
    counts = {name: choices.count(name) for name in reversed(NAMES)}  # those that keep least first
    for name, count in counts.items():
        taken = min(left, -(-count // unit) * unit)
        runs += [name] * taken
        left -= taken
    return remat_text(tuple(runs))


def lower_plan(
    config: TransformerConfig, split: Split, batch: int, length: int, devices: list[Any]
) -> jax.stages.Lowered:
    """The train step of a configuration (`trained_config`) on a split, traced for shapes.

    Raises InputError for pipelines, whose step is not compiled here.
    """
    mesh = split.mesh
    if mesh.pipe > 1:
        raise InputError(f"mesh {mesh}: steps with a pipeline are not compiled here; plan without axis pipe")
    layout = Elsewhere(make_mesh(mesh, devices), zero=split.zero)
    training = TrainingConfig(
        steps=1, batch=batch, accumulate=split.accumulate, precision="bf16", offload=split.offload
    )
    row = {name: np.zeros(length, np.int32) for name in ROW} | {"weights": np.zeros(length, np.float32)}
    job = language_model_job(Transformer(config), [row], training, layout=layout)
    shapes = {name: jax.ShapeDtypeStruct((batch, length), jnp.int32) for name in ROW}
    shapes["weights"] = jax.ShapeDtypeStruct((batch, length), jnp.float32)
    return lower_step(job, training, layout, NO_SCALING, shapes)


def prove(lowered: jax.stages.Lowered, split: Split) -> Proof:
    """Compile a lowered step and read what it needs and does."""
    compiled, text = compile_to_text(lowered)
    said: Any = compiled.memory_analysis()
    return Proof(
        arguments=said.argument_size_in_bytes,
        outputs=said.output_size_in_bytes,
        aliased=said.alias_size_in_bytes,
        temporaries=said.temp_size_in_bytes,
        host=said.host_argument_size_in_bytes + said.host_temp_size_in_bytes,
        code=said.generated_code_size_in_bytes,
        walked=walk(text, mesh_sizes(split)).merged(),
    )


def compile_to_text(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """The compiled program and its text.

    libtpu's `as_text` fails on some programs with collectives in the background ("async-update instruction
    should have 1 operands"); what the compiler itself writes down is whole.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            if lack := EXHAUSTED.search(str(error)):
                raise InputError(f"by its compiler the step does not fit: {lack[0]}") from error
            raise
        written = sorted(Path(folder).rglob(f"*{FINAL}"), key=lambda path: path.stat().st_size)
        return compiled, written[-1].read_text() if written else compiled.as_text() or ""


def mesh_sizes(split: Split) -> dict[str, int]:
    """Axes and sizes in the order in which `make_mesh` lays devices out."""
    return {axis: getattr(split.mesh, axis) for axis in MESH_AXES}
