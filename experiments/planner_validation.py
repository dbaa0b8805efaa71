"""Study: what the planner predicts beside what was published, and beside what the compiler says.

Claim: predicted utilisation is within a third of the published one for most large training runs.
Command: modicum study planner-validation --markdown docs/results/planner_validation.md
Cost: half a minute, no device.
Expected: docs/results/planner_validation.md
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..models.attention import multi_head
from ..models.mlp import MLP
from ..models.presets import gpt2, preset
from ..parallel.mesh import MeshShape
from ..parallel.plan import CHIPS, Assumptions, Job, Search, Split, Topology, recipe
from ..parallel.plan.memory import fixed_memory
from ..research.planning.published import RUNS
from ..research.planning.tables import layer_table
from ..research.planning.training import TrainingCost, utilisation
from ..research.planning.validation import Prediction, predict
from ..research.study.tables import Cell, Table

GIB = 2**30
BATCHES = (8, 16, 24, 32)
DEEPSPEED_BUFFERS = 3e9  # bytes: 1e9 live parameters and a bucket of 5e8 numbers, both fp16 (apps.md 5.1)


class Configuration(NamedTuple):
    """A row of BMTrain's table: system, ZeRO level, model parallelism, and the batches at which it ran."""

    name: str
    recipe: str
    zero: int
    tensor: int
    buffers: float
    ran: tuple[int, ...]


BMTRAIN_TABLE = (
    Configuration("BMTrain", "bmtrain", 3, 1, 0.0, (8, 16, 24, 32)),
    Configuration("ZeRO3 (mp=1)", "mixed", 3, 1, DEEPSPEED_BUFFERS, (8, 16, 24)),
    Configuration("ZeRO3 (mp=4)", "mixed", 3, 4, DEEPSPEED_BUFFERS, (8,)),
    Configuration("ZeRO3 (mp=8)", "mixed", 3, 8, DEEPSPEED_BUFFERS, (8,)),
    Configuration("ZeRO2 (mp=1)", "mixed", 2, 1, DEEPSPEED_BUFFERS, ()),
    Configuration("ZeRO2 (mp=4)", "mixed", 2, 4, DEEPSPEED_BUFFERS, (8,)),
    Configuration("ZeRO2 (mp=8)", "mixed", 2, 8, DEEPSPEED_BUFFERS, (8,)),
)


def utilisation_table(found: Sequence[Prediction]) -> Table:
    """Published and predicted model FLOPs utilisation of every run."""
    rows: list[tuple[Cell, ...]] = []
    for one in found:
        mesh = f"{one.plan.split.mesh}" + ("" if one.run.mesh else " (planned)")
        rows.append(
            (
                *(one.run.name, f"{one.plan.topology} {one.run.chip}", mesh, _percent(one.run.figure)),
                *(_percent(one.mfu), _signed(one.error), _signed(one.held_out_error)),
                None if math.isnan(one.asked) else round(one.asked, 2),
            )
        )
    columns = (
        *("run", "chips", "mesh", "published MFU %", "predicted %", "error %"),
        *("error, held out %", "efficiency it asks for"),
    )
    return Table(columns, tuple(rows), "Model FLOPs utilisation, each in its publisher's convention")


def megatron_arithmetic() -> float:
    """MT-NLG's utilisation from its own step time: 60.1 s for 1920 x 2048 tokens of 530e9 on 2240 A100."""
    return utilisation(6 * 530e9, 1920 * 2048 / 60.1, 2240, 312e12)


def out_of_memory_table(per_card: bool = True) -> tuple[Table, int, int]:
    """GiB a card of 13 billion parameters on 32 V100, and how many of the cells agree with the published
    table.

    40 layers of 5120 with 128 heads at length 512, scores stored, every layer recomputed; a batch is per
    card, so that a replica of mp cards computes mp times as much, or else per replica.
    """
    rows, agreed = list[tuple[Cell, ...]](), 0
    card = CHIPS["v100"].memory * (1 - Assumptions().reserve)
    for one in BMTRAIN_TABLE:
        cells: list[Cell] = [one.name]
        for batch in BATCHES:
            needed = thirteen_billion(one, batch if per_card else batch / one.tensor)
            fits, ran = needed <= card, batch in one.ran
            agreed += fits == ran
            mark = "runs" if fits else "out of memory"
            cells.append(f"{needed / GIB:.1f}, {mark}" + ("" if fits == ran else " (published: other)"))
        rows.append(tuple(cells))
    columns = ("system", *(f"batch {batch}" for batch in BATCHES))
    caption = f"GiB a card; {card / GIB:.1f} are taken to be free"
    return Table(columns, tuple(rows), caption), agreed, len(BMTRAIN_TABLE) * len(BATCHES)


def thirteen_billion(one: Configuration, batch: float) -> float:
    """Bytes of a card under one row's configuration, with `batch` rows for each card."""
    config = replace(
        gpt2(40, 5120, 128), dropout=0.1, attention=multi_head(128), mlp=MLP(4 * 5120, "gelu_tanh")
    )
    used = recipe(one.recipe)
    table = layer_table(config, 512, used, flash=False)
    split = Split(MeshShape(data=32 // one.tensor, tensor=one.tensor), one.zero, sequence=False)
    rows = round(32 * batch)
    fixed = fixed_memory(table, used, split, rows, 512)
    kept = sum(layer.remats[-1].kept(one.tensor, False) for layer in table.layers)
    return fixed.total + kept * split.tokens(rows, 512) + one.buffers


def compiler_table(kept: Path) -> Table:
    """The memory model beside XLA's account of CPM-Ant 10B on four v5p (docs/results/delta_memory.jsonl)."""
    found = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    full = [one for one in found if one["case"]["method"] == "full" and one["devices"] == 4]
    full.sort(key=lambda one: [one["case"][name] for name in ("remat", "length", "batch")])
    rows = [_compiler_row(one["case"], one["total"] / GIB) for one in full]
    columns = ("batch", "length", "recomputed", "compiler's GiB, all chips", "predicted", "error %")
    caption = "CPM-Ant 10B, full tuning, recipe modicum, tensor=4"
    return Table(columns, tuple(rows), caption)


def _compiler_row(case: dict[str, Any], seen: float) -> tuple[Cell, ...]:
    used, batch, length, remat = recipe("modicum"), case["batch"], case["length"], case["remat"]
    table = layer_table(preset("cpm-ant-10b"), length, used)
    split = Split(MeshShape(tensor=4), 0, sequence=False)
    fixed = fixed_memory(table, used, split, batch, length)
    ways = [{way.name: way for way in layer.remats}[remat] for layer in table.layers]
    kept = sum(way.kept(4, False) for way in ways) * split.tokens(batch, length)
    predicted = 4 * (fixed.total + kept) / GIB
    return batch, length, remat, round(seen, 1), round(predicted, 1), f"{100 * (predicted / seen - 1):+.1f}"


def gpt3_arguments() -> float:
    """GiB of parameters and moments in float32 on each of 64 chips."""
    table, used = layer_table(preset("gpt3-175b"), 2048, recipe("modicum")), recipe("modicum")
    memory = fixed_memory(table, used, Split(MeshShape(fsdp=64)), 64, 2048)
    return (memory.parameters + memory.optimizer) / GIB


def cpm_table() -> Table:
    """CPM-Ant 10B planned on 8 and 32 A100 of either size, 512 rows of 512 tokens a step."""
    rows: list[tuple[Cell, ...]] = []
    used = recipe("bmtrain")
    table = layer_table(preset("cpm-ant-10b"), 512, used, name="cpm-ant-10b", flash=False)
    for name in ("a100-40", "a100-80"):
        for hosts in (1, 4):
            topology = Topology(CHIPS[name], (hosts, 8))
            best = Search().plans(Job(table, used, 512, 512), topology)[0]
            rate = 512 * 512 / best.time.total
            cost = TrainingCost(200e9, topology.size, rate)
            rows.append(
                (
                    *(f"{topology.size} {name}", str(best), round(best.memory.total / GIB, 1)),
                    *(round(rate), _percent(utilisation(table.useful, rate, topology.size, 312e12))),
                    round(cost.days, 1),
                )
            )
    columns = ("chips", "plan", "GiB a card", "tokens/s", "MFU %", "days for 200 billion tokens")
    return Table(columns, tuple(rows), "CPM-Ant 10B, planned")


def memory_text(kept: Path) -> str:
    """The two sections on memory as Markdown."""
    pattern, agreed, cells = out_of_memory_table()
    _, otherwise, _ = out_of_memory_table(per_card=False)
    return f"""## Memory: which systems ran out of it

BMTrain's README trains 13 billion parameters on 32 V100 and leaves cells empty, presumably where memory ran
out. {pattern.caption}.

{pattern.markdown()}
**{agreed} of {cells} cells agree.** Taken: cards of 32 GB (the README does not say; 31.7 GiB by nvidia-smi,
5% of it not ours), scores stored, every layer recomputed, a batch per card (so a replica of mp cards
computes mp times as much), and for DeepSpeed 3 GB of live parameters and buckets by its defaults. The table
does not say whose batch it is: read as a replica's, {otherwise} of {cells} would agree. The nearest cells are
within 0.6 GiB of the limit on either side, so all of them agreeing is partly luck.

## Memory: the compiler

{compiler_table(kept).caption}, compiled ahead of time for TPU v5p 2x2x1 (docs/results/delta_memory.md):

{compiler_table(kept).markdown()}
Nothing was fitted to these; the compiler's scheduling is not modelled. A hand-written ZeRO-3 x tensor step
of GPT-3 175B on 64 v5p measured 30.5 GiB of arguments a chip; 12 bytes a parameter are
{gpt3_arguments():.1f} GiB.
"""


def validation_text(kept: Path) -> str:
    """The whole study as Markdown."""
    found = predict(RUNS)
    errors = [abs(one.error) for one in found]
    alone = [abs(one.held_out_error) for one in found]
    asked = statistics.median(one.asked for one in found if not math.isnan(one.asked))
    sources = "\n".join(f"* {one.run.name}, {one.run.chip}: {one.run.source}." for one in found)
    return f"""# The planner beside published runs

`modicum study planner-validation --markdown docs/results/planner_validation.md` makes this page: arithmetic
from shapes and data sheets, no device. Formulas and what is left out: docs/plan.md.

## Utilisation

{utilisation_table(found).markdown()}
Median absolute error **{statistics.median(errors):.0%}**, worst {max(errors):.0%},
{sum(e <= 1 / 3 for e in errors)} of {len(found)} within a third. The model has one free number, the share
of the peak that matrix products reach: {Assumptions().efficiency:g} for every chip, about the median of
what these runs ask for ({asked:.2f}). *Held out*: predicted with the median of what the *other* runs ask
for, so that a run has no say in its own prediction: median {statistics.median(alone):.0%}, worst
{max(alone):.0%}.
Where no mesh was published the planner's best stands, which flatters: nobody's mesh is optimal, and the
remat policy is then the planner's too. GPT-3 is the one far off: its cluster, mesh and software (of 2020) are
not published, and V100s of that time reached half of what the same model asks of later chips. Whole-run
figures are not here, as downtime is not modelled.

Figures and their sources:

{sources}

**MT-NLG's arithmetic** (same step time in, same utilisation out): 1920 x 2048 tokens in 60.1 s on 2240 A100
at 312 TFLOP/s and 6 x 530e9 operations a token is {megatron_arithmetic():.2%}; 29.77% is what
research/apps.md found, 29.7% the reported figure.

{memory_text(kept)}
## CPM-Ant 10B

BMTrain's 14 bytes a parameter, 512 rows of 512 tokens, scores stored:

{cpm_table().markdown()}
The team's log ([CPM-Live], research/openbmb.md 4.10) shows 15.6 GB of text a day on 32 A100, about 1,130
tokens/s a card at an assumed 5 bytes a token: {1130 * 6 * 9.39e9 / 312e12:.0%} utilisation.
"""


def write_validation(kept: Path, markdown: Path | None) -> str:
    """The page's text, also written to `markdown` where one is given."""
    text = validation_text(kept)
    if markdown is not None:
        markdown.write_text(text, encoding="utf-8")
    return text


def _percent(value: float) -> float:
    return round(100 * value, 1)


def _signed(value: float) -> str:
    return f"{100 * value:+.0f}"
