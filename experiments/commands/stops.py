"""What a run that ended before its last step says, and the exit code it gives."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

from .progress import say

if TYPE_CHECKING:
    from ...research.training.loop import Outcome


def exit_code(outcome: Outcome, folder: Path) -> int:
    """0 where training ended by itself; 128 plus the signal's number, as shells do, where it was stopped."""
    if outcome.stopped is None or not outcome.stopped.startswith("SIG"):
        if outcome.stopped:
            say(f"{folder}: stopped after step {int(outcome.state.step)}: {outcome.stopped}")
        return 0
    say(f"{folder}: {outcome.stopped} after step {int(outcome.state.step)}, saved; the same command goes on")
    return 128 + signal.Signals[outcome.stopped]
