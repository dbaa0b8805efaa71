"""What many tasks take on disk: a copy of the model each, or one backbone and a delta each.

From shapes alone; a delta is stored in float32, a model in bfloat16 unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from .. import InputError
from ..models.costs import abstract_parameters
from ..models.precision import Precision
from ..models.presets import preset
from ..models.transformer import Transformer
from ..research.delta import BitFit, LoRA, Prefix, SoftPrompt, Spec, attach
from ..research.delta.summary import parameter_count
from ..research.study.tables import Cell, Table

METHODS: dict[str, Spec] = {
    "LoRA, rank 8, query and value": {"attention/(query|value)": LoRA(8)},
    "LoRA, rank 1, query and value": {"attention/(query|value)": LoRA(1)},
    "BitFit": {"": BitFit()},
    "prefix of 6": {"attention": Prefix(6)},
    "soft prompt of 100": {"": SoftPrompt(100)},
}
SIZES = {"float32": 4, "bfloat16": 2}
TALK = 10_000  # times less


@dataclass(frozen=True)
class Stored:
    """Numbers of one model and of one task's delta by each method, and why others are not among them."""

    model: str
    backbone: int
    deltas: dict[str, int]
    refused: dict[str, str] = field(default_factory=dict)


def count_stored(model: str) -> Stored:
    """Count a preset's parameters and those of each method's delta on it."""
    transformer = Transformer(replace(preset(model), scan=True, precision=Precision("bfloat16", "bfloat16")))
    params = abstract_parameters(transformer)
    deltas, refused = dict[str, int](), dict[str, str]()
    for name, spec in METHODS.items():
        try:
            deltas[name] = delta_size(transformer, params, spec)
        except InputError as error:  # BitFit on a model without biases
            refused[name] = str(error)
    return Stored(model, parameter_count(params), deltas, refused)


def delta_size(model: Transformer, params: Any, spec: Spec) -> int:
    """Trained numbers of a delta; raises `InputError` where the model has nothing that the method acts on."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    made = jax.eval_shape(attach(model, spec).init, jax.random.key(0), params, tokens)
    return parameter_count(made["delta"])


def storage_table(stored: Stored, tasks: int, model: str = "bfloat16", delta: str = "float32") -> Table:
    """Bytes of `tasks` tasks, and how many times less than full copies, with and without the backbone."""
    copy = stored.backbone * SIZES[model]
    rows: list[tuple[Cell, ...]] = [("full copies", 100.0, _gb(copy), _gb(tasks * copy), 1.0, None)]
    for name, count in stored.deltas.items():
        one = count * SIZES[delta]
        rows.append(
            (
                name,
                float(f"{100 * one / copy:.3g}"),
                _gb(one),
                _gb(tasks * one + copy),
                round(tasks * copy / (tasks * one + copy), 1),
                round(copy / one),
            )
        )
    columns = (
        *(f"{stored.model}, {tasks} tasks", "% of a copy, bytes", "GB a task", "GB of all, with backbone"),
        *("times less, with backbone", "times less, without"),
    )
    return Table(columns, tuple(rows), f"Models in {model}, deltas in {delta}")


def _gb(size: float) -> float:
    return float(f"{size / 1e9:.4g}")


def storage_text(stored: Stored, tasks: int) -> str:
    """The tables for both precisions of a delta, and what the talk's factor needs, as Markdown."""
    text = f"{stored.model}: {stored.backbone:,} parameters; trained numbers a task: "
    text += "; ".join(f"{name} {count:,}" for name, count in stored.deltas.items()) + ".\n"
    text += "".join(f"Left out: {name} ({why}).\n" for name, why in stored.refused.items())
    for delta in SIZES:
        table = storage_table(stored, tasks, delta=delta)
        text += f"\n{table.caption}:\n\n{table.markdown()}"
    enough = [name for name, count in stored.deltas.items() if count * TALK <= stored.backbone]
    return text + (
        f"\nWith the backbone counted once, {tasks} tasks never take less than 1/{tasks} of their copies. "
        f"{TALK:,} times less needs at most {100 / TALK:g} % a task and the backbone left out: "
        f"in one precision throughout, {', '.join(enough) or 'none of these'}.\n"
    )
