"""What a training run is asked for, as plain values: this module imports no jax."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ... import InputError

OptimizerName = Literal["adamw", "adafactor", "lion", "muon", "sgd"]
ScheduleName = Literal["constant", "cosine", "linear", "rsqrt", "wsd"]


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the steps: linear warmup, then a shape, down to `final` times the peak.

    `wsd` is warmup, stable, decay: constant until the last `decay` fraction of the steps after the warmup,
    then linear (Hu et al., "MiniCPM", 2024). `rsqrt` falls as 1 / sqrt(step) (Raffel et al., 2020) and
    knows no `final`. `warmup` counts steps, or where below 1 a fraction of all steps.
    """

    name: ScheduleName = "cosine"
    warmup: float = 0.05
    final: float = 0.1
    decay: float = 0.2


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its numbers; `clip` is the largest global gradient norm (0: no clipping).

    Weight decay acts on matrices and tables only, not on biases and norms.
    """

    name: OptimizerName = "adamw"
    learning_rate: float = 1e-3
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name}={value} must be a finite number of at least 0")


@dataclass(frozen=True)
class TrainingConfig:
    """A run of `steps` updates on `batch` rows each.

    `accumulate` splits each batch into that many parts, one after another. `ema` is the decay of an
    exponential moving average of the trained parameters (0: none). Every `evaluate_every` and
    `checkpoint_every` steps (0: only at the end) the model is evaluated and stored; `keep` latest
    checkpoints stay, and the best by `best_metric` (smallest, or largest where it starts with `+`).
    `patience` evaluations without a better `best_metric` stop the run (0: never). `loss_chunk` counts the
    tokens whose logits over the vocabulary a device holds at a time (0: all; None: all where they take at
    most `models.word_losses.AUTOMATIC_BYTES`, else as many as do). With `offload` the optimizer's state lies
    in the host's memory and is on the device only while it is updated.
    """

    steps: int = 1000
    batch: int = 32
    accumulate: int = 1
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    seed: int = 0
    ema: float = 0.0
    log_every: int = 10
    evaluate_every: int = 0
    checkpoint_every: int = 0
    keep: int = 2
    best_metric: str = "loss"
    patience: int = 0
    loss_chunk: int | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if self.batch % self.accumulate:
            raise InputError(f"batch={self.batch} does not divide into accumulate={self.accumulate} parts")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed={self.seed} must be at least 0 and below 2**32")
        if self.patience and not self.evaluate_every:
            raise InputError(f"patience={self.patience} needs evaluate_every of at least 1")
        if self.loss_chunk is not None and self.loss_chunk < 0:
            raise InputError(f"loss_chunk={self.loss_chunk} must be at least 0")
        if not 0.0 <= self.ema < 1.0:
            raise InputError(f"ema={self.ema} must be at least 0 and below 1")

    @property
    def best_mode(self) -> Literal["min", "max"]:
        """Whether smaller or larger values of `best_metric` are better."""
        return "max" if self.best_metric.startswith("+") else "min"

    @property
    def best_name(self) -> str:
        """The metric's name without its sign."""
        return self.best_metric.removeprefix("+")
