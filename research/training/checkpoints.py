"""Checkpoints that are written in the background, survive a kill, and are checked when read.

Orbax writes each step into a temporary folder and renames it when all of it is there, so a run
killed at any moment leaves whole steps only. What it does not do is notice damage: a flipped bit
in a data file is restored in silence. Each step therefore carries a record (`checkpoint_record`)
with a fingerprint of every array, compared after loading; a damaged step is passed over, with one
warning, for the one before.

    FOLDER/1200/state     the arrays (OCDBT, orbax)
    FOLDER/1200/record    the record (JSON)

Arrays are always restored onto the caller's abstract target: the mesh may differ from the one that
saved them in shape and in size.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from ... import InputError
from ...parallel.processes import is_lost_process
from .checkpoint_arrays import empty_array, nested, read_arrays, stored_tree
from .checkpoint_record import Record, Unreadable, describe, differences, is_array
from .fingerprint import leaf_paths

__all__ = ["Checkpoints", "Restored", "checkpoint_steps", "load_arrays"]

logger = logging.getLogger(__name__)


class Restored(NamedTuple):
    """What `Checkpoints.restore` found: the state, the metadata saved with it, and its step."""

    state: Any
    metadata: Mapping[str, Any]
    step: int


@dataclass
class Checkpoints:
    """The checkpoints of one run, in one folder.

    Attributes:
        folder: where they are; made at the first save.
        keep: how many of the newest steps stay.
        best: (metric, "min" or "max"): also keep the `keep_best` steps with the best metric.
        keep_best: how many best steps stay beside the newest.
        interval: `due(step)` holds every so many steps.
    """

    folder: Path
    keep: int = 3
    best: tuple[str, Literal["min", "max"]] | None = None
    keep_best: int = 1
    interval: int = 1
    _manager: ocp.CheckpointManager | None = field(default=None, init=False, repr=False)
    _metrics: dict[int, Mapping[str, float]] = field(default_factory=dict, init=False, repr=False)
    _rejected: list[int] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder).absolute()
        for name in ("keep", "keep_best", "interval"):
            if getattr(self, name) < 1:
                raise InputError(f"checkpoints: {name} is {getattr(self, name)}; at least 1 is valid")
        if self.best is not None and self.best[1] not in ("min", "max"):
            raise InputError(
                f"checkpoints: best is {self.best!r}; valid is (metric, 'min') or (metric, 'max')"
            )
        _quieten_orbax()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after `step` steps."""
        return step % self.interval == 0

    def save(
        self,
        step: int,
        state: Any,
        metadata: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        wait: bool = False,
    ) -> bool:
        """Save `state` (any pytree of arrays, numbers and text) as `step`; returns at once unless `wait`.

        The arrays are copied before this returns, so the caller may donate them. A step that is there
        already is left as it is, and False returned. Every process must call it.

        Raises:
            InputError: where a newer step is there, or `metrics` lacks the one `best` names.
        """
        manager = self._writer()
        if wait and step in manager.all_steps():
            manager.wait_until_finished()
        if not self._may_write(step, manager.all_steps(), metrics):
            return False
        record = Record.of(state, metadata or {}, metrics or {})
        self._metrics[step] = record.metrics
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(stored_tree(state)), record=ocp.args.JsonSave(record.to_json())
        )
        manager.save(step, args=items, force=True)
        if wait:
            manager.wait_until_finished()
        return True

    def restore(self, abstract: Any, step: int | None = None) -> Restored | None:
        """The newest good checkpoint on the target `abstract`; None where the folder holds none.

        `abstract` mirrors the state: `jax.ShapeDtypeStruct`s with a sharding (without one: the first
        local device), numpy arrays for what is to stay on the host, and any number or text for the rest.
        With `step`, that one or an error. Every process must call it.

        Raises:
            InputError: for a checkpoint of another model, or where no checkpoint can be read.
        """
        self.wait()
        steps = _chosen_steps(self.folder, step)
        reasons = []
        for candidate in steps:
            try:
                state, metadata = _restore(self.folder / str(candidate), abstract)
            except Unreadable as damage:
                reasons.append(f"step {candidate}: {damage}")
                continue
            if step is None:
                self._rejected = [each for each in steps if each > candidate]
            _warn(self.folder, reasons, candidate)
            return Restored(state, metadata, candidate)
        if steps:
            raise _none_good(self.folder, reasons)
        return None

    def best_step(self) -> int | None:
        """The step with the best metric among those in the folder; None before there is one."""
        self.wait()
        ranked = self._ranked(checkpoint_steps(self.folder))
        return ranked[0] if ranked else None

    def wait(self) -> None:
        """Return when everything saved so far is on disk; raises what went wrong with it."""
        if self._manager is not None:
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for the writing, then release the threads; the object may be used again."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and is_lost_process(error):  # a save would wait for it, half a minute and more
            self._manager = None
        self.close()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Which steps stay: orbax's `PreservationPolicy` protocol."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*sorted(steps)[-self.keep :], *self._ranked(steps)[: self.keep_best]}
        return [step in kept for step in steps]

    def _ranked(self, steps: Sequence[int]) -> list[int]:
        """The steps that have a finite value of the metric, the best first, of equals the earlier."""
        if self.best is None:
            return []
        name, mode = self.best
        values = {step: self._metrics_of(step).get(name, math.nan) for step in steps}
        sign = 1 if mode == "min" else -1
        finite = [step for step in steps if math.isfinite(values[step])]
        return sorted(finite, key=lambda step: (sign * values[step], step))

    def _metrics_of(self, step: int) -> Mapping[str, float]:
        if step not in self._metrics:
            try:
                self._metrics[step] = Record.read(_record_file(self.folder / str(step))).metrics
            except Unreadable:
                self._metrics[step] = {}
        return self._metrics[step]

    def _may_write(self, step: int, existing: Sequence[int], metrics: Mapping[str, float] | None) -> bool:
        if self.best is not None and metrics and self.best[0] not in metrics:
            raise InputError(
                f"checkpoints: metric {self.best[0]!r} is not among {', '.join(sorted(metrics))}"
            )
        if step in existing:
            return False
        if existing and max(existing) > step:
            raise InputError(
                f"{self.folder}: step {step} cannot be saved, the newer step {max(existing)} is there; "
                "continue from that one or save to another folder"
            )
        return True

    def _writer(self) -> ocp.CheckpointManager:
        """The manager, made at the first save; steps that could not be read are put aside before."""
        if self._rejected:
            self._put_aside()
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self,
                lightweight_initialize=True,  # else a damaged metrics file stops the constructor
                cleanup_tmp_directories=True,  # what a killed run left half-written
            )
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        return self._manager

    def _put_aside(self) -> None:
        """Rename the steps that could not be read, so that their numbers are free to be saved again."""
        self.close()
        if jax.process_index() == 0:
            for step in self._rejected:
                target = next(path for path in _damaged_names(self.folder, step) if not path.exists())
                (self.folder / str(step)).rename(target)
                logger.warning("%s: damaged step %d is now %s", self.folder, step, target.name)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("modicum checkpoints: damaged steps put aside")
        self._metrics.clear()
        self._rejected = []


def checkpoint_steps(folder: Path) -> list[int]:
    """The finished steps in `folder`, ascending; empty where there is no such folder."""
    if not Path(folder).is_dir():
        return []
    names = ocp.path.step.standard_name_format()
    return sorted(found.step for found in names.find_all(epath.Path(folder)))


def load_arrays(folder: Path, prefix: str = "", step: int | None = None) -> Restored:
    """Read arrays alone, as a nested dict of numpy arrays, without knowing the state they are part of.

    Typed random keys, which numpy does not have, are left out.

    Args:
        folder: a folder of checkpoints.
        prefix: path of the sub-tree to read (`trainable`), which alone is then read from disk.
        step: which one; the newest good one by default.

    Raises:
        InputError: where there is no checkpoint, none that can be read, or nothing under `prefix`.
    """
    folder = Path(folder).absolute()
    steps = _chosen_steps(folder, step)
    reasons: list[str] = []
    for candidate in steps:
        try:
            record = Record.read(_record_file(folder / str(candidate)))
            arrays = read_arrays(folder / str(candidate), _host_targets(record, prefix, folder), record)
        except Unreadable as damage:
            reasons.append(f"step {candidate}: {damage}")
            continue
        _warn(folder, reasons, candidate)
        tree = nested({path.removeprefix(prefix).lstrip("/"): leaf for path, leaf in arrays.items()})
        return Restored(tree, record.metadata, candidate)
    raise _none_good(folder, reasons) if steps else InputError(f"{folder}: no checkpoint there")


def _restore(folder: Path, abstract: Any) -> tuple[Any, Mapping[str, Any]]:
    record = Record.read(_record_file(folder))
    found = differences(record.leaves, describe(abstract))
    if found:
        more = f"; and {len(found) - 3} more leaves differ" if len(found) > 3 else ""
        raise InputError(f"{folder}: a checkpoint of another model: {'; '.join(found[:3])}{more}")
    leaves = leaf_paths(abstract)
    targets = {path: leaf for path, leaf in leaves.items() if is_array(leaf)}
    arrays = read_arrays(folder, targets, record)
    flat = [arrays[path] if path in arrays else record.values[path] for path in leaves]
    return jax.tree.unflatten(jax.tree.structure(abstract), flat), record.metadata


def _host_targets(record: Record, prefix: str, folder: Path) -> dict[str, np.ndarray]:
    chosen = [path for path in record.fingerprints if f"{path}/".startswith(f"{prefix}/" if prefix else "")]
    if not chosen:
        roots = sorted({path.split("/")[0] for path in record.fingerprints})
        raise InputError(f"{folder}: no arrays under {prefix!r}; at the root are {', '.join(roots)}")
    arrays = [path for path in chosen if not record.leaves[path].startswith("key<")]
    return {path: empty_array(record.leaves[path]) for path in arrays}


def _record_file(step_folder: Path) -> Path:
    return step_folder / "record" / "metadata"  # the name JsonSave gives its file


def _chosen_steps(folder: Path, step: int | None) -> list[int]:
    """The steps to try, newest first, or `step` alone."""
    steps = checkpoint_steps(folder)[::-1]
    if step is None:
        return steps
    if step not in steps:
        there = ", ".join(str(each) for each in steps[::-1]) or "none"
        raise InputError(f"{folder}: no checkpoint of step {step}; there are: {there}")
    return [step]


def _damaged_names(folder: Path, step: int) -> Iterator[Path]:
    yield folder / f"{step}.damaged"
    number = 2
    while True:
        yield folder / f"{step}.damaged-{number}"
        number += 1


def _warn(folder: Path, reasons: Sequence[str], used: int) -> None:
    for reason in reasons:
        logger.warning("%s: %s; going back to step %d", folder, reason, used)


def _none_good(folder: Path, reasons: Sequence[str]) -> InputError:
    return InputError(f"{folder}: no checkpoint there can be read: {'; '.join(reasons)}")


def _quieten_orbax() -> None:
    """Drop what orbax logs below an error, and of a lost process, which is raised too. Once is enough."""
    absl = logging.getLogger("absl")
    if _is_news not in absl.filters:
        absl.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    if record.exc_info and record.exc_info[1] is not None and is_lost_process(record.exc_info[1]):
        return False
    return record.levelno >= logging.ERROR or "orbax" not in record.pathname
