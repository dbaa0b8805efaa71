"""A plan beside its compiled proof, as text: memory, collectives by mesh axis, the command that trains."""

from __future__ import annotations

from ...parallel.plan import Assumptions, Job, Plan
from ..study.tables import Cell, Table
from .compiled import Proof, trained_remat

GIB = 2**30


def train_command(model: str, plan: Plan, job: Job) -> str:
    """What runs the plan; the data are the user's. Raises InputError for what `modicum train` cannot do.

    Over `pipe` micro-batches are the pipeline's, and are kept longer than the plan's, which is in 1F1B order.
    """
    split = plan.split
    parts_of_a_batch = "--micro-batches" if split.mesh.pipe > 1 else "--accumulate"
    parts = [
        f"modicum train DATA --preset {model} --length {job.length} --scan --remat {trained_remat(plan)}",
        f"--batch {job.batch} {parts_of_a_batch} {split.accumulate} --precision bf16",
        f"--mesh {split.mesh} --zero {split.zero}",
    ]
    return " ".join([*parts, *(["--offload"] if split.offload else [])])


def proof_text(plan: Plan, job: Job, proof: Proof, assume: Assumptions) -> str:
    """The compiled step's memory and collectives beside the plan's."""
    time = proof.time(plan.topology, plan.split, assume)
    lines = [
        "compiled ahead of time, the step of `modicum train`:",
        "",
        compiled_table(plan, proof).markdown(),
        collective_table(proof).markdown(),
        f"compiled peak {proof.total / GIB:.2f} GiB a device, planned {plan.memory.total / GIB:.2f} "
        f"({plan.memory.total / proof.total - 1:+.1%}); program {proof.code / GIB:.2f} GiB",
        f"walked: {proof.walked.flops / 1e12:,.1f} TFLOP a device, {time.own:.3g} s on the chip, "
        f"{time.waiting:.3g} s waiting for collectives, {time.beside:.3g} s of them beside other work: "
        f"{time.total:.3g} s a step, planned {plan.time.total:.3g} s",
    ]
    if proof.walked.unknown:
        lines.append(f"note: {len(proof.walked.unknown)} loops of unknown trips count once")
    if proof.walked.kernels:
        lines.append(f"note: {proof.walked.kernels} kernels state no operations and count none")
    return "\n".join(lines) + "\n"


def compiled_table(plan: Plan, proof: Proof) -> Table:
    """Bytes of a device by the compiler's kinds, and the plan's kinds that they hold."""
    memory = plan.memory
    rows: list[tuple[Cell, ...]] = [
        ("arguments", _gib(proof.arguments), _gib(memory.parameters + memory.optimizer)),
        ("of them aliased with outputs", _gib(proof.aliased), None),
        ("outputs", _gib(proof.outputs), None),
        ("temporaries", _gib(proof.temporaries), _gib(memory.total - memory.parameters - memory.optimizer)),
    ]
    if proof.host or memory.host:
        rows.append(("in the host's memory", _gib(proof.host), _gib(memory.host)))
    return Table(("compiled memory of a device", "GiB", "planned"), tuple(rows))


def collective_table(proof: Proof) -> Table:
    """How often each kind of collective runs a step, and what a device sends."""
    rows = tuple(
        (kind, " x ".join(axes) or "-", count, _gib(size))
        for (kind, axes), (count, size) in sorted(proof.walked.sent().items())
    )
    return Table(("collective", "over", "times a step", "GiB sent"), rows)


def _gib(size: float) -> float:
    return float(f"{size / GIB:.4g}")
