"""Training memory of full tuning and of deltas, by the compiler's account; no weights are needed.

The train step is compiled ahead of time, for the CPU or for a TPU that need not be there, and XLA says what
it needs: arguments (parameters, optimizer state, batch) and temporaries (gradients, activations).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ..models.costs import abstract_parameters
from ..models.placement import placed
from ..models.precision import BF16, Precision
from ..models.presets import preset
from ..models.transformer import Transformer
from ..parallel.layout import Layout
from ..parallel.mesh import MeshShape, make_mesh
from ..parallel.plan.target import tpu_devices
from ..parallel.rules import AxisTable
from ..research.delta import BitFit, LayerNormTuning, LoRA, Prefix, Spec, attach, delta_axes
from ..research.delta.summary import parameter_count
from ..research.study.tables import Cell, Table
from ..research.training.config import OptimizerConfig, ScheduleConfig
from ..research.training.memory import CompiledMemory, compiled_memory
from ..research.training.objectives import delta_tuning, full_tuning, language_modelling
from ..research.training.optimizers import make_optimizer
from ..research.training.state import create_state
from ..research.training.step import make_train_step

Method = Literal["full", "lora", "bitfit", "norms", "prefix"]
Remat = Literal["none", "full", "dots"]
METHODS: dict[str, Callable[[], Spec]] = {
    "lora": lambda: {"attention/(query|value)": LoRA(8)},
    "bitfit": lambda: {"": BitFit()},
    "norms": lambda: {"": LayerNormTuning()},
    "prefix": lambda: {"attention": Prefix(64)},
}
FROZEN = Precision("bfloat16", "bfloat16", "float32")
EXHAUSTED = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm")
GIB = 2.0**30


@dataclass(frozen=True)
class MemoryCase:
    """One train step: a preset, what is tuned of it, its batch, and how much is recomputed.

    Full tuning has float32 parameters computed with in bfloat16 (the library's `bf16`); a delta's backbone is
    frozen and stored in bfloat16, its own numbers are float32. AdamW's moments are float32.
    """

    model: str
    method: Method
    batch: int
    length: int
    remat: Remat = "full"


@dataclass(frozen=True)
class MemoryFound:
    """What a case needs, in bytes over all `devices`; where it does not fit there is no `compiled`."""

    case: MemoryCase
    trained: int
    devices: int
    compiled: CompiledMemory | None
    total: float


def devices_of(topology: str) -> list[Any]:
    """Devices to compile for: the CPU, or a TPU's such as `v5p:2x2x1` (package libtpu; none is needed).

    Raises `InputError` where libtpu is absent or does not know the topology.
    """
    return tpu_devices(topology) if topology else jax.local_devices()[:1]


def measure_memory(case: MemoryCase, devices: list[Any]) -> MemoryFound:
    """Compile the step of `case`, heads and widths split over `devices`."""
    layout = Layout(make_mesh(MeshShape(tensor=len(devices)), devices))
    lowered, trained = _lowered(case, layout)
    try:
        compiled = compiled_memory(lowered.compile())
    except jax.errors.JaxRuntimeError as error:
        found = EXHAUSTED.search(str(error))
        if found is None:
            raise
        total = float(found[1]) * 1024 ** (1 + "KMGT".index(found[2])) * len(devices)
        return MemoryFound(case, trained, len(devices), None, total)
    assert compiled is not None
    return MemoryFound(case, trained, len(devices), compiled, float(compiled.total * len(devices)))


def _lowered(case: MemoryCase, layout: Layout) -> tuple[jax.stages.Lowered, int]:
    """The step traced for shapes, and how many numbers it trains."""
    precision = BF16 if case.method == "full" else FROZEN
    model = Transformer(replace(preset(case.model), scan=True, remat=case.remat, precision=precision))
    params = abstract_parameters(model)
    tokens = jax.ShapeDtypeStruct((case.batch, case.length), jnp.int32)
    weights = jax.ShapeDtypeStruct(tokens.shape, jnp.float32)
    batch = {"tokens": tokens, "targets": tokens, "weights": weights}
    forward, trainable, frozen = full_tuning(model), params, {}
    axes: AxisTable | None = model.axes
    if case.method != "full":
        tuned = attach(model, METHODS[case.method]())
        made = jax.eval_shape(tuned.init, jax.random.key(0), params, tokens)
        forward, trainable, axes = delta_tuning(tuned), made["delta"], delta_axes(tuned, model.axes)
        frozen = {"params": params, "delta_state": made["delta_state"]}
    optimizer = make_optimizer(OptimizerConfig("adamw", 1e-3, ScheduleConfig("constant", warmup=0)), steps=1)
    state = jax.eval_shape(lambda tree: create_state(tree, optimizer), trainable)
    loss = placed(language_modelling(forward), layout)
    shardings = layout.state(state, axes)
    step = jax.jit(
        make_train_step(loss, optimizer), donate_argnums=0, out_shardings=(shardings, layout.replicated())
    )
    given = (
        _placed(state, shardings),
        _placed(frozen, layout.parameters(frozen, axes)),
        _placed(batch, layout.batch(batch)),
    )
    return step.lower(*given), parameter_count(trainable)


def _placed(shapes: Any, shardings: Any) -> Any:
    def place(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, shapes, shardings)


def memory_table(found: Iterable[MemoryFound]) -> Table:
    """A row for each case, and what it saves of full tuning with the same batch and recomputation."""
    cases = list(found)
    whole = {_setting(one.case): one.total for one in cases if one.case.method == "full"}
    rows = [_row(one, whole.get(_setting(one.case))) for one in cases]
    columns = (
        *("batch", "length", "recomputed", "method", "trained", "arguments GiB"),
        *("temporaries GiB", "total GiB", "% saved"),
    )
    return Table(columns, tuple(rows), "Memory of a train step by XLA's account")


def _setting(case: MemoryCase) -> tuple[str, int, int, str]:
    return case.model, case.batch, case.length, case.remat


def _row(one: MemoryFound, full: float | None) -> tuple[Cell, ...]:
    case, split = one.case, one.compiled
    saved = None if full is None or case.method == "full" else round(100 * (1 - one.total / full), 1)
    arguments = round(split.arguments * one.devices / GIB, 2) if split else None
    temporaries = round((split.temporaries + split.outputs) * one.devices / GIB, 2) if split else None
    total: Cell = round(one.total / GIB, 2)
    return (
        *(case.batch, case.length, case.remat, case.method, one.trained),
        *(arguments, temporaries, total if split else f"{total} (does not fit)", saved),
    )


def measure_all(
    cases: Sequence[MemoryCase], topology: str, kept: Path | None, report: Callable[[str], None] = print
) -> list[MemoryFound]:
    """Each case in turn; those that the file `kept` has, for the same devices, are read and not compiled."""
    known = {} if kept is None or not kept.exists() else dict(map(_read, kept.read_text().splitlines()))
    devices: list[Any] = []  # found when needed: libtpu serves one process at a time
    found = []
    for case in cases:
        key = json.dumps([topology, dataclasses.asdict(case)])
        if key not in known:
            report(f"compiling {case.method}, batch {case.batch}, length {case.length}, remat {case.remat}")
            devices = devices or devices_of(topology)
            known[key] = measure_memory(case, devices)
            if kept is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                with kept.open("a") as file:
                    file.write(json.dumps({"key": key, **dataclasses.asdict(known[key])}) + "\n")
        found.append(known[key])
    return found


def _read(line: str) -> tuple[str, MemoryFound]:
    row = json.loads(line)
    split = row["compiled"] and CompiledMemory(**row["compiled"])
    case = MemoryCase(**row["case"])
    return row["key"], MemoryFound(case, row["trained"], row["devices"], split, row["total"])
