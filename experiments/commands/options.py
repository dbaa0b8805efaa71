"""Options that several verbs share. This module imports no jax: `modicum --help` is instant."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ... import InputError
from ...research.training.config import OptimizerConfig, ScheduleConfig, TrainingConfig

if TYPE_CHECKING:
    from ...parallel.layout import Layout

UNLIMITED_LENGTH = 128
"""Tokens of the longest text, unless told, where a model's positions have no limit."""
BEST_METRICS = {"loss": "loss", "accuracy": "+accuracy"}


def refuse_unused(options: Any, names: Iterable[str], why: str) -> None:
    """Raise `InputError` where one of these fields is given, which nothing would come of; `why` says so."""
    defaults = {each.name: each.default for each in fields(options)}
    given = [name for name in names if getattr(options, name) != defaults[name]]
    if given:
        written = " and ".join("--" + name.replace("_", "-") for name in given)
        raise InputError(f"{written} given, but {why}")


@dataclass(frozen=True)
class TrainingOptions:
    """How to train."""

    steps: int = 1000
    """Updates."""
    batch: int = 32
    """Rows of a batch, over all devices."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after another."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic; parameters stay fp32."""
    optimizer: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = "adamw"
    schedule: Literal["constant", "cosine", "linear", "rsqrt", "wsd"] = "cosine"
    warmup: float = 0.05
    """Steps of rising learning rate; below 1, a fraction of all steps."""
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    ema: float = 0.0
    """Decay of a moving average of the trained numbers, evaluated and stored in their place; 0: none."""
    evaluate_every: int = 100
    """Steps between evaluations; 0: at the end only."""
    checkpoint_every: int = 100
    """Steps between checkpoints; 0: at the end and at evaluations only."""
    patience: int = 0
    """Stop after so many evaluations without a better one; 0: never."""
    seed: int = 0

    def config(self, learning_rate: float, best: Literal["loss", "accuracy"]) -> TrainingConfig:
        """The run's configuration at one learning rate, keeping the best checkpoint by `best`."""
        schedule = ScheduleConfig(self.schedule, self.warmup)
        return TrainingConfig(
            steps=self.steps,
            batch=self.batch,
            accumulate=self.accumulate,
            precision=self.precision,
            optimizer=OptimizerConfig(
                self.optimizer, learning_rate, schedule, self.weight_decay, clip=self.clip
            ),
            seed=self.seed,
            ema=self.ema,
            evaluate_every=self.evaluate_every,
            checkpoint_every=self.checkpoint_every,
            best_metric=BEST_METRICS[best],
            patience=self.patience,
        )


@dataclass(frozen=True)
class PlacementOptions:
    """Where to run."""

    mesh: str = ""
    """Devices along each axis, such as data=4,tensor=2; empty: the first device."""
    zero: Literal[0, 1, 2, 3] = 0
    """What is split over the data axis: 1 optimizer state, 2 gradients too, 3 parameters too."""
    micro_batches: int = 0
    """Parts of a batch that go through the stages of a mesh with pipe; 0: as many as fit, to 4 a stage."""
    rounds: int = 1
    """How many times each part goes through all stages, of as many fewer layers each; shortens the bubble."""
    coordinator: str | None = None
    """host:port of process 0 where several processes train together; launchers are recognised."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """Which of them this is, from 0."""

    def layout(self, batch: int) -> Layout:
        """Join the processes, then lay out the mesh; refuses one that does not divide `batch` rows."""
        import jax

        from ...parallel.layout import Layout
        from ...parallel.mesh import MeshShape, make_mesh
        from ...parallel.pipeline import Schedule
        from ...parallel.processes import initialize
        from .compilation import cache_compilations

        self._require_all_or_none()
        cache_compilations()
        initialize(self.coordinator, self.processes, self.process)
        if not self.mesh and (self.zero or jax.process_count() > 1):
            why = f"zero={self.zero} splits over" if self.zero else f"{jax.process_count()} processes share"
            raise InputError(f"{why} a mesh, and none is given; add --mesh data={jax.device_count()}")
        if not self.mesh:
            return Layout.single()
        schedule = Schedule(self.micro_batches, self.rounds)
        layout = Layout(make_mesh(MeshShape.parse(self.mesh)), zero=self.zero, schedule=schedule)
        layout.local_rows(batch)
        return layout

    def _require_all_or_none(self) -> None:
        given = {name: getattr(self, name) for name in ("coordinator", "processes", "process")}
        missing = [f"--{name}" for name, value in given.items() if value is None]
        if missing and len(missing) < len(given) and self.processes != 1:
            raise InputError(
                f"{' and '.join(missing)} missing; several processes need all of "
                f"{', '.join(f'--{name}' for name in given)}, or none under a launcher"
            )


def seeds_of(count: int, seeds: tuple[int, ...]) -> tuple[int, ...]:
    """The seeds 0, 1, ... of `count`, or for 0 the `seeds` of a study's size; raises `InputError` below."""
    if count < 0:
        raise InputError(f"seeds={count} must be at least 0 (0: those of the size)")
    return tuple(range(count)) or seeds


def size_folder(out: Path, size: str) -> Path:
    """Where a study's runs of a size lie: of the full one in `out` itself, of others beside it."""
    return out if size == "full" else out.with_name(f"{out.name}-{size}")


def require_folder(out: Path | None) -> None:
    """Raise `InputError` where tables could not be written into `out`."""
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"out={out} is a file; give a folder")
