"""Bytes a device of a decoder's gradient on eight simulated devices: in pipeline stages, and without.

    python -m modicum.experiments.bench.stages

Prints the table of docs/pipeline.md: what the compiler allots (`memory_analysis`), nothing is run. A minute.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from ...models import GroupedQuery, Rotary, Transformer, TransformerConfig
from ...models.placement import placed
from ...parallel import Layout, MeshShape, make_mesh
from ...parallel.pipeline import Schedule
from ...research.training.objectives import full_tuning, language_modelling

BATCH, LENGTH = 32, 128
SHAPE = TransformerConfig(
    layers=8, width=128, vocab=256, attention=GroupedQuery(4), positions=Rotary(), scan=True
)
KINDS = ("all-gather", "all-to-all", "all-reduce", "collective-permute")


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    mesh: str
    schedule: Schedule = Schedule()
    remat: str = "full"

    def bubble(self) -> float:
        """The part of the turns in which a device has no work."""
        devices = MeshShape.parse(self.mesh).pipe
        turns = self.schedule.micro_batches * self.schedule.rounds + devices - 1
        return (devices - 1) / turns if devices > 1 else 0.0


CASES = (
    Case("data=8", remat="none"),
    Case("data=8"),
    Case("data=2,pipe=4", Schedule(8), "none"),
    Case("data=2,pipe=4", Schedule(4)),
    Case("data=2,pipe=4", Schedule(8)),
    Case("data=2,pipe=4", Schedule(16)),
    Case("data=2,pipe=4", Schedule(4, rounds=2)),
    Case("data=2,pipe=4", Schedule(8, rounds=2)),
)


def compiled_gradient(case: Case) -> jax.stages.Compiled:
    """Loss and gradients of one batch."""
    model = Transformer(replace(SHAPE, remat=case.remat))
    layout = Layout(make_mesh(MeshShape.parse(case.mesh)), schedule=case.schedule)
    loss = language_modelling(full_tuning(model))
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    weights = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.float32)
    batch = {"tokens": tokens, "targets": tokens, "weights": weights}
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32)))
    shardings = layout.parameters(params, model.axes)

    def value(params: Any, batch: Any) -> jax.Array:
        return loss(params, {}, batch, None).total

    step = jax.jit(
        jax.value_and_grad(placed(value, layout)),
        in_shardings=(shardings, layout.batch(batch)),
        out_shardings=(layout.replicated(), shardings),
    )
    return step.lower(params, batch).compile()


def row(case: Case) -> str:
    """One line of the table."""
    compiled = compiled_gradient(case)
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    found = [len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in KINDS]
    mib = [size / 2**20 for size in (memory.argument_size_in_bytes, memory.temp_size_in_bytes)]
    parts, rounds = case.schedule.micro_batches or "-", case.schedule.rounds
    sizes = " | ".join(f"{size:.1f}" for size in mib)
    counts = " | ".join(map(str, found))
    return f"| {case.mesh} | {case.remat} | {parts} | {rounds} | {case.bubble():.0%} | {sizes} | {counts} |"


def main() -> None:
    """Print the table."""
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_platforms", "cpu")
    names = ("mesh", "remat", "M", "R", "bubble", "arguments MiB", "temporaries MiB", *KINDS)
    print("|", " | ".join(names), "|")
    print("|", " | ".join("---" for _ in names), "|")
    for case in CASES:
        print(row(case), flush=True)


if __name__ == "__main__":
    main()
