"""Study: what the planner predicts of a train step beside what TPU compilers say of the same step.

Claim: predicted peak memory is within 10% of the compiler's, and the plan's step times rank as those found by
walking the compiled programs do.
Command: modicum study planner-compiled --markdown docs/results/planner_compiled.md
Cost: about 20 minutes on one core, resumable; needs libtpu (extra `tpu`), no TPU.
Expected: docs/results/planner_compiled.md
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import kendalltau

from .. import InputError
from ..models.config import TransformerConfig
from ..models.presets import preset
from ..parallel.mesh import MeshShape
from ..parallel.plan import Assumptions, Job, Plan, Search, Split, Topology, chip, recipe
from ..parallel.plan.target import target_devices
from ..parallel.plan.walk import Walked, Work
from ..research.planning.compiled import Proof, lower_plan, prove, trained_config
from ..research.planning.tables import layer_table
from ..research.study.tables import Cell, Table

GIB = 2**30


class Case(NamedTuple):
    """One train step: a preset's shape on some chips, how it is split, and what its layers compute again."""

    model: str
    chip: str
    topology: str
    mesh: str
    zero: int
    accumulate: int
    remat: str
    batch: int
    length: int

    @property
    def config(self) -> TransformerConfig:
        """As the trainer runs it, without dropout."""
        return trained_config(replace(preset(self.model), dropout=0.0), self.remat, self.length)

    @property
    def split(self) -> Split:
        """How it is divided."""
        return Split(MeshShape.parse(self.mesh), self.zero, self.accumulate)

    def __str__(self) -> str:
        return f"{self.model} on {self.topology} {self.chip}, {self.mesh}, remat {self.remat}"


CASES = (
    Case("ladder-1b", "v4", "2x2x1", "fsdp=4", 0, 1, "full", 32, 2048),
    Case("ladder-1b", "v4", "2x2x1", "fsdp=2,tensor=2", 0, 2, "dots", 16, 2048),
    Case("gpt2-medium", "v4", "2x2x1", "data=4", 1, 1, "none", 32, 1024),
    Case("gpt2-medium", "v5e", "2x2", "fsdp=4", 0, 1, "dots", 32, 1024),
    Case("ladder-0.3b", "v5e", "2x2", "data=2,tensor=2", 2, 2, "none", 32, 1024),
    Case("gpt2-large", "v5e", "2x4", "fsdp=2,tensor=4", 0, 1, "full", 64, 1024),
    Case("ladder-7b", "v5p", "2x2x2", "fsdp=8", 0, 1, "full", 64, 2048),
    Case("ladder-3b", "v5p", "2x2x2", "fsdp=2,tensor=4", 0, 1, "none", 32, 2048),
    Case("cpm-ant-10b", "v5p", "2x2x2", "fsdp=4,tensor=2", 0, 2, "middle", 64, 1024),
    Case("ladder-1b", "v6e", "2x2", "fsdp=4", 0, 1, "mlp", 32, 1024),
    Case("gpt2-xl", "v6e", "2x4", "fsdp=8", 0, 2, "dots", 64, 1024),
    Case("ladder-3b", "v6e", "2x4", "tensor=8", 0, 1, "full", 8, 2048),
)
SMOKE = (Case("quick", "v5e", "2x2", "fsdp=2,tensor=2", 0, 1, "full", 8, 128),)


@dataclass(frozen=True)
class Found:
    """A case with what its compiler said; predictions are made anew."""

    case: Case
    proof: Proof

    def plan(self, assume: Assumptions) -> Plan:
        """What the planner says of the very same split and remat."""
        case, each = self.case, recipe("modicum")
        topology, lanes = self.topology, chip(case.chip).lanes
        table = layer_table(case.config, case.length, each, name=case.model, chunked=None, lanes=lanes)
        job = Job(table, each, case.batch, case.length)
        search = Search(remats=(case.remat,), mesh=case.split.mesh, assume=assume)
        plan, need = search.evaluate(job, topology, case.split)
        if plan is None:
            raise InputError(f"{case}: the plan needs {need.device / GIB:.1f} GiB, more than the chip has")
        return plan

    @property
    def topology(self) -> Topology:
        """Its chips."""
        return Topology.parse(chip(self.case.chip), self.case.topology)


def measure(cases: Sequence[Case], kept: Path | None, report: Callable[[str], None] = print) -> list[Found]:
    """Compile each case; those that the file `kept` has are read and not compiled again."""
    known = dict(map(_read, kept.read_text().splitlines())) if kept and kept.exists() else {}
    for case in cases:
        if case not in known:
            report(f"compiling {case}")
            topology = Topology.parse(chip(case.chip), case.topology)
            lowered = lower_plan(case.config, case.split, case.batch, case.length, target_devices(topology))
            known[case] = prove(lowered, case.split)
            if kept is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                with kept.open("a") as file:
                    file.write(json.dumps({"case": case, **_row(known[case])}) + "\n")
    return [Found(case, known[case]) for case in cases]


def memory_table(found: Sequence[Found], assume: Assumptions) -> Table:
    """GiB of a device: the compiler's and the plan's."""
    rows = [_memory_row(one, one.plan(assume)) for one in found]
    columns = (
        *("model", "chips", "mesh", "ZeRO", "parts", "remat", "arguments", "temporaries", "peak"),
        *("predicted", "error %"),
    )
    return Table(columns, tuple(rows), "GiB of a device: the compiler's, and the plan's")


def time_table(found: Sequence[Found], assume: Assumptions) -> Table:
    """Milliseconds of a step: the plan's, and the walk's of the compiled program."""
    rows = []
    for one in found:
        plan = one.plan(assume)
        walked = one.proof.time(one.topology, one.case.split, assume)
        rows.append(
            (
                *(one.case.model, f"{one.case.topology} {one.case.chip}", one.case.mesh, one.case.remat),
                *(_ms(plan.time.total), _ms(walked.total), _ms(walked.own), _ms(walked.waiting)),
                *(_ms(walked.beside), round(one.proof.walked.flops / 1e12, 2)),
            )
        )
    columns = (
        *("model", "chips", "mesh", "remat", "planned ms", "walked ms", "on the chip", "waiting"),
        *("beside", "TFLOP"),
    )
    return Table(columns, tuple(rows), "A step by the plan and by the compiled program")


def errors(found: Sequence[Found], assume: Assumptions) -> list[float]:
    """Relative errors of predicted peak memory."""
    return [one.plan(assume).memory.total / one.proof.total - 1 for one in found]


def agreement(found: Sequence[Found], assume: Assumptions) -> tuple[float, float]:
    """Kendall's tau of planned against walked time: of a step, and of a useful operation at the chip's peak.

    The first says that large jobs take longer; the second, time over the least time, compares efficiency.
    """
    planned, walked, least = [], [], []
    for one in found:
        plan, on = one.plan(assume), one.topology
        planned.append(plan.time.total)
        walked.append(one.proof.time(on, one.case.split, assume).total)
        table = layer_table(one.case.config, one.case.length, recipe("modicum"))
        least.append(table.useful * one.case.batch * one.case.length / on.size / on.chip.flops(on.chip.half))
    plain = kendalltau(planned, walked).statistic
    return float(plain), float(
        kendalltau(
            [time / base for time, base in zip(planned, least)],
            [time / base for time, base in zip(walked, least)],
        ).statistic
    )


def page(found: Sequence[Found], assume: Assumptions) -> str:
    """The study as Markdown."""
    wrong = errors(found, assume)
    worst, within = max(map(abs, wrong)), sum(abs(each) <= 0.1 for each in wrong)
    plain, efficiency = agreement(found, assume)
    unknown = sum(len(one.proof.walked.unknown) for one in found)
    absent = [str(case) for case in CASES if case not in [one.case for one in found]]
    note = f"\nNot compiled yet: {'; '.join(absent)}.\n" if absent and len(found) > 1 else ""
    return f"""# The planner beside the compiler

`modicum study planner-compiled --markdown docs/results/planner_compiled.md` makes this page: the step of
`modicum train`, compiled ahead of time by libtpu for slices that are not here; no step was run. Formulas:
docs/plan.md.

## Memory

{memory_table(found, assume).markdown()}
Predicted peaks within 10%: **{within} of {len(found)}**, worst {worst:.0%}. Peak: arguments, temporaries and
outputs that are no argument's buffer. Parts: micro-batches. No number is fitted to them. What *none* keeps
was corrected after first cases by what the compiler's list of buffers shows: what JAX saves and XLA merges,
and that the operands of attention's kernel lie in tiles, so that heads of 64 numbers take the memory of 128
(both cases over `data` missed by it: -14% and -12%). With ZeRO 1 and 2 the compiler scatters each layer's
gradient as soon as it is there, in every micro-batch: to ask for it inside the sum over micro-batches
changed no byte. The plan counts whole gradients with ZeRO 1, and one 16-bit copy of the parameters where the
compiler may keep a second in another layout.

## Time

{time_table(found, assume).markdown()}
Kendall's tau of planned and walked time: **{plain:.2f}**; of time over the least time that the useful
operations take at the peak, so that size does not count: **{efficiency:.2f}**. Both take
{assume.efficiency} of the peak and the links of docs/plan.md; the walk counts what is compiled: operations
and bytes of every instruction times the trips of its loops ({unknown} of unknown trips), collectives by the
mesh axes of their groups. *On the chip*: roofline of everything but collectives; *waiting*: collectives that
the program waits for; *beside*: those that it computes beside other work.
{note}"""


def _memory_row(one: Found, plan: Plan) -> tuple[Cell, ...]:
    case, proof = one.case, one.proof
    return (
        *(case.model, f"{case.topology} {case.chip}", case.mesh, case.zero, case.accumulate, case.remat),
        *(_gib(proof.arguments), _gib(proof.temporaries), _gib(proof.total), _gib(plan.memory.total)),
        f"{100 * (plan.memory.total / proof.total - 1):+.1f}",
    )


def _row(proof: Proof) -> dict[str, Any]:
    return dataclasses.asdict(proof)


def _read(line: str) -> tuple[Case, Proof]:
    row = json.loads(line)
    case, walked = Case(*row.pop("case")), row.pop("walked")
    from ..parallel.plan.groups import Collective

    walked["works"] = [Work(**work) for work in walked["works"]]
    walked["collectives"] = [Collective._make(map(_hashable, each)) for each in walked["collectives"]]
    return case, Proof(**row, walked=Walked(**walked))


def _hashable(part: Any) -> Any:
    return tuple(part) if isinstance(part, list) else part


def _gib(size: float) -> float:
    return round(size / GIB, 2)


def _ms(seconds: float) -> float:
    return float(f"{seconds * 1e3:.4g}")
