"""A progress bar with the numbers that matter; silent where nobody watches."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Report = Callable[[int, Mapping[str, float]], None]

SCREEN = "MODICUM_SCREEN"
"""Set to the file descriptor of the terminal that a supervising parent writes to (`supervision`)."""


def console() -> Console:
    """Where people read: standard error, so that standard output stays for results.

    Of a supervised process that is a pipe which its parent reads; the parent's terminal comes beside it.
    """
    if SCREEN in os.environ:
        return Console(file=os.fdopen(int(os.environ[SCREEN]), "w", closefd=False))
    return Console(stderr=True)


def say(text: str) -> None:
    """Print a result; of several processes the first speaks for all."""
    from ...parallel.processes import is_main

    if is_main():
        print(text, flush=True)


def notice(line: str) -> None:
    """Say what is going on, on standard error."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def training_bar(label: str, steps: int) -> Iterator[Report]:
    """Show loss, rate, MFU where the peak is known, and the time left, while training for `steps` steps.

    Where nobody watches, and for who scrolls back, one line says how it ended. Of several processes the
    first shows it.
    """
    from ...parallel.processes import is_main

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
    )
    screen, began, seen = console(), time.perf_counter(), dict[str, float]()
    shown = screen.is_terminal and is_main()
    with Progress(*columns, console=screen, disable=not shown, transient=True) as progress:
        task = progress.add_task(label, total=steps, numbers="compiling")

        def report(step: int, metrics: Mapping[str, float]) -> None:
            progress.update(task, completed=step, numbers=describe(metrics))
            seen.update(metrics, step=step)

        yield report
    if seen and is_main():
        took = time.perf_counter() - began
        screen.print(f"{label}: step {seen['step']} of {steps}, loss {seen['loss']:.3f}, {took:.0f} s")


def describe(metrics: Mapping[str, float]) -> str:
    """Loss, rate and MFU in a few characters; MFU is a dash where the device's peak is not known."""
    parts = [f"loss {metrics['loss']:.3f}"]
    rates = [(name, value) for name, value in metrics.items() if name.endswith("_per_second")]
    parts += [f"{value:,.0f} {name.removesuffix('_per_second')}/s" for name, value in rates]
    parts.append(f"MFU {metrics['mfu']:.1%}" if "mfu" in metrics else "MFU –")
    return "  ".join(parts)
