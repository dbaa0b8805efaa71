"""`Job`: what is trained, on what; everything that the loop needs to know of a model and its data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import optax

from ...parallel.rules import AxisTable
from .evaluation import SumsOf
from .objectives import Loss

Tree = Any
Evaluation = dict[str, float]
Wrap = Callable[[optax.GradientTransformation, int], optax.GradientTransformation]


@dataclass(frozen=True)
class Job:
    """What is trained, on what.

    `init(rng, initial)` makes the trained tree from the arrays `initial`, by default the frozen ones; it
    runs jitted, so nothing is ever on one device that is meant for many. `batches(step)` is this process's
    part of the batch of a step, as numpy arrays `[B, ...]`. `axes` names the axes of the trained tree;
    `evaluate(trainable, frozen)` returns means by name, of what the jitted `sums_of` gives for a batch.
    Losses weigh by `unit`s, whose rate is reported; `flops_per_unit` is for MFU. `wrap(optimizer, steps)` is
    the optimizer with what a method adds to it (AdaLoRA's budget, LoRA+). Evaluations before step `best_from`
    are of what is not settled yet: none of them is kept as the best, nor ends the run.
    """

    loss: Loss
    init: Callable[[jax.Array, Tree], Tree]
    batches: Callable[[int], Mapping[str, np.ndarray]]
    frozen: Tree = field(default_factory=dict)
    initial: Tree | None = None
    axes: AxisTable | None = None
    evaluate: Callable[[Tree, Tree], Evaluation] | None = None
    sums_of: SumsOf | None = None
    unit: str = "tokens"
    flops_per_unit: float | None = None
    wrap: Wrap | None = None
    best_from: int = 0
