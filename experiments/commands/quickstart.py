"""`modicum quickstart`: the whole story in minutes, offline, on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Quickstart:
    """Train a small model on Python's own library, tune it five ways, and report what fires.

    Offline, on a CPU, in under five minutes on two cores. Stopped at any point and started again, it goes
    on. Writes report.html and CSV tables.
    """

    out: Path = Path("runs/quickstart")
    """Folder of the runs and the report."""
    smoke: bool = False
    """A minute instead of minutes: shows that it works, not what it finds."""
    sweep: bool = False
    """Try every method at every learning rate instead, on the dev split: where the defaults come from."""

    def run(self) -> int:
        """Run what is not done yet, then write the report."""
        from ..quickstart import FULL, SMOKE, Interrupted, run_quickstart, sweep_learning_rates
        from ..quickstart_report import write_report, write_sweep
        from .compilation import cache_compilations
        from .progress import training_bar
        from .stops import exit_code

        size = SMOKE if self.smoke else FULL
        folder = self.out.with_name(f"{self.out.name}-smoke") if self.smoke else self.out
        cache_compilations()
        try:
            if self.sweep:
                print(write_sweep(folder, sweep_learning_rates(folder, size, training_bar)))
                return 0
            print(write_report(folder, run_quickstart(folder, size, training_bar)))
        except Interrupted as stop:
            return exit_code(stop.outcome, stop.folder)
        return 0
