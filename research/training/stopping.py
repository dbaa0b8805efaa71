"""Reasons to stop before the last step: a signal, numbers that are not finite, no more progress."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import jax

from ... import InputError
from ...parallel.processes import SUPERVISED, any_process
from .config import TrainingConfig
from .loss_scale import SMALLEST

TOGETHER = 1.0
"""Seconds in which a signal that comes twice is one: from a terminal or a launcher, and from the parent."""


class NonFiniteLoss(InputError):
    """The loss or a gradient became infinite or not a number."""


class Interruption:
    """Set by SIGTERM or SIGINT: finish the step, save, and go."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def agreed(self, at: bool) -> str | None:
        """The signal's name, if there was one; read it once a step.

        Several processes have to stop after the same step or wait for each other for ever, so they ask
        each other, which costs a collective: only where `at`, which is the same in all of them.
        """
        if jax.process_count() == 1:
            return self.signal
        if not at:
            return None
        return "SIGTERM" if any_process(self.signal is not None) else None


@contextlib.contextmanager
def interruption() -> Iterator[Interruption]:
    """Turn the first SIGTERM or SIGINT into a flag; a second one acts as usual.

    Where a parent forwards signals (`SUPERVISED`) one may come twice, and the second counts a second later.
    Outside the main thread, where Python allows no handlers, the flag stays unset.
    """
    flag = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    first = dict[int, float]()

    def note(number: int, frame: FrameType | None) -> None:
        flag.signal, again = signal.Signals(number).name, number in first
        late = time.monotonic() - first.setdefault(number, time.monotonic()) > TOGETHER
        if late or SUPERVISED not in os.environ:
            signal.signal(number, previous[signal.Signals(number)])
        if again and late:
            signal.raise_signal(number)

    for number in previous:
        signal.signal(number, note)
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def require_finite(step: int, metrics: Mapping[str, Any], skips: bool) -> None:
    """Raise `NonFiniteLoss` naming the step, unless loss scaling `skips` it and can still go lower."""
    if bool(metrics["finite"]) or (skips and float(metrics["loss_scale"]) > SMALLEST):
        return
    what = "gradient" if math.isfinite(float(metrics["loss"])) else "loss"
    raise NonFiniteLoss(
        f"step {step}: the {what} is not finite (loss {float(metrics['loss'])}); the checkpoints before it "
        f"are kept: lower the learning rate, lengthen the warmup or clip gradients"
    )


def out_of_patience(evaluations: Sequence[Mapping[str, float]], config: TrainingConfig) -> bool:
    """Whether the last `patience` evaluations all failed to beat the best before them."""
    if not config.patience or len(evaluations) <= config.patience:
        return False
    sign = -1 if config.best_mode == "max" else 1
    values = [sign * evaluation[config.best_name] for evaluation in evaluations]
    values = [value if math.isfinite(value) else math.inf for value in values]
    return min(values[-config.patience :]) >= min(values[: -config.patience])
