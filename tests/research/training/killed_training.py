"""Kill a training run at random moments, resume it, and compare with a run that was left alone.

    python tests/research/training/killed_training.py --kills 10

Each kill is a SIGKILL a random number of steps and a random fraction of a step after the start, so it
falls into steps, evaluations and checkpoints alike. Prints what was found on disk after each; exits with
1 unless the metrics are equal to the undisturbed run's byte for byte and the last checkpoints' arrays too.
`--train FOLDER` is the run itself, in a process of its own.
"""

import argparse
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

STEPS = 36


class Kill(NamedTuple):
    """One kill: the step last heard of, the steps stored, and whether a checkpoint was half-written."""

    step: int
    stored: list[int]
    writing: bool


def train_in(folder: Path) -> None:
    """Train or go on with the run in `folder`, saying each step on standard output."""
    import jax

    from modicum.research.study.runs import Run
    from modicum.research.training.config import OptimizerConfig, ScheduleConfig, TrainingConfig
    from modicum.research.training.loop import train

    jax.config.update("jax_platforms", "cpu")
    tiny = runpy.run_path(str(Path(__file__).with_name("tiny_job.py")))
    config = TrainingConfig(
        steps=STEPS,
        batch=4,
        optimizer=OptimizerConfig("adamw", 0.01, ScheduleConfig("cosine", 5)),
        ema=0.9,
        log_every=1,
        evaluate_every=10,
        checkpoint_every=3,
    )
    run = Run.open(folder.parent, config, name=folder.name)
    job = tiny["job_of"](tiny["TinyModel"](width=64))

    def report(step: int, metrics: object) -> None:
        print(step, flush=True)
        time.sleep(0.05)  # or a checkpoint would always be on its way when the signal comes

    outcome = train(job, config, run, report=report)
    print(outcome.stopped or "finished", flush=True)


def start(folder: Path) -> subprocess.Popen:
    """The run in `folder` in a process of its own; compiled programs are kept beside it."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, __file__, "--train", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **cache})


def said(process: subprocess.Popen) -> Iterator[str]:
    """The lines of a process, as they come."""
    assert process.stdout is not None
    for line in process.stdout:
        yield line.strip()


def finish(folder: Path) -> list[str]:
    """Let the run in `folder` come to its end; returns what it said."""
    process = start(folder)
    lines = list(said(process))
    if process.wait() != 0:
        raise RuntimeError(f"the run in {folder} failed")
    return lines


def stop(folder: Path, steps: int, delay: float, number: int) -> tuple[Kill, int]:
    """Send signal `number` `delay` seconds after `steps` steps; returns what was left and the exit code."""
    process = start(folder)
    heard = "0"
    for count, line in enumerate(said(process), 1):
        heard = line
        if count == steps:
            time.sleep(delay)
            process.send_signal(number)
    code = process.wait()
    names = os.listdir(folder / "checkpoints") if (folder / "checkpoints").exists() else []
    stored = sorted(int(name) for name in names if name.isdigit())
    step = int(heard) if heard.isdigit() else stored[-1]
    return Kill(step, stored, any("tmp" in name for name in names)), code


def kill_often(folder: Path, kills: int, rng: random.Random) -> Iterator[Kill]:
    """Kill the run in `folder` so often, each time a few steps further."""
    for _ in range(kills):
        kill, code = stop(
            folder, rng.randint(1, 2 * STEPS // (kills + 1)), rng.random() * 0.1, signal.SIGKILL
        )
        if code == 0:
            return  # it was faster than the signal
        yield kill


def difference(folder: Path, other: Path) -> str | None:
    """How two finished runs differ, or None."""
    one, two = ((each / "metrics.jsonl").read_bytes() for each in (folder, other))
    if one != two:
        lines = zip(one.splitlines(), two.splitlines())
        unequal = next((number for number, (a, b) in enumerate(lines, 1) if a != b), "last")
        return f"metrics.jsonl differs in line {unequal}"
    records = [
        (each / "checkpoints" / str(STEPS) / "record" / "metadata").read_bytes() for each in (folder, other)
    ]
    return None if records[0] == records[1] else "the fingerprints of the last checkpoint differ"


def main() -> int:
    """Read the command line; 0 where nothing differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10, help="how often (10)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--train", type=Path, metavar="FOLDER", help="be the run that is killed")
    options = parser.parse_args()
    if options.train:
        train_in(options.train)
        return 0
    with tempfile.TemporaryDirectory() as name:
        undisturbed, killed = Path(name) / "undisturbed", Path(name) / "killed"
        finish(undisturbed)
        print("kill  after step  newest stored  writing a checkpoint")
        for number, kill in enumerate(kill_often(killed, options.kills, random.Random(options.seed)), 1):
            newest = kill.stored[-1] if kill.stored else "-"
            print(
                f"{number:4}  {kill.step:10}  {newest:>13}  {'yes' if kill.writing else 'no':>20}", flush=True
            )
        finish(killed)
        found = difference(undisturbed, killed)
        print(found or f"{STEPS} steps: metrics and last checkpoint equal the undisturbed run's")
        return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
