"""Kill `modicum train` at random moments, start it again each time, and compare with a run left alone.

    python tests/experiments/commands/kills.py --kills 10

A kill is a SIGKILL to `python -m modicum train …` at a random step and a random fraction of a second after
it, or at a random moment of its start, so it falls into imports, compilation, steps, evaluations and
checkpoints. Prints what was on disk after each; exits with 1 unless metrics, result and the stored model
equal those of the undisturbed run byte for byte.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

STEPS = 30
OPTIONS = ["--length", "32", "--batch", "8", "--vocab", "300", "--steps", STEPS, "--scan"]
OPTIONS += ["--evaluate-every", "10", "--checkpoint-every", "3"]
COMPARED = ("metrics.jsonl", "result.json", "model/parameters.safetensors", "model/model.json")


class Kill(NamedTuple):
    """One kill: seconds since the start, records and checkpoints that were stored, and a half-written one."""

    seconds: float
    recorded: int
    stored: list[int]
    writing: bool


def write_corpus(folder: Path) -> Path:
    """Lines that a model can learn something from; returns the file."""
    rng = random.Random(0)
    words = ["small", "parts", "matter", "most", "neurons", "fire", "rarely", "and", "few", "change", "much"]
    lines = (" ".join(rng.choices(words, weights=range(1, 12), k=12)) for _ in range(400))
    file = folder / "corpus.txt"
    file.write_text("\n".join(lines))
    return file


def start(corpus: Path, out: Path) -> subprocess.Popen:
    """The command in a process of its own; compiled programs are kept beside the corpus."""
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": os.environ.get(
            "JAX_COMPILATION_CACHE_DIR", str(corpus.parent / "compiled")
        ),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, "-m", "modicum", "train", corpus, "--out", out, *OPTIONS]
    return subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def finish(corpus: Path, out: Path) -> str:
    """Let the command come to its end; returns what it said."""
    process = start(corpus, out)
    said, errors = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"exit code {process.returncode}: {errors}")
    return said


def records(out: Path) -> int:
    """How many records the metrics file has."""
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def stop(
    corpus: Path, out: Path, number: int, more: int, delay: float, patience: float = 120.0
) -> tuple[Kill, int]:
    """Send signal `number`, `delay` seconds after `more` new records; what was left, and the exit code."""
    process, begun = start(corpus, out), time.monotonic()
    known = records(out) if more else 0
    while more and process.poll() is None and time.monotonic() < begun + patience:
        found = records(out)
        known = min(known, found)  # cut back to the checkpoint before going on
        if found >= known + more:
            break
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(number)
    process.communicate()
    seconds = time.monotonic() - begun
    names = os.listdir(out / "checkpoints") if (out / "checkpoints").exists() else []
    stored = sorted(int(name) for name in names if name.isdigit())
    return Kill(seconds, records(out), stored, any("tmp" in name for name in names)), process.returncode


def kill_often(corpus: Path, out: Path, kills: int, rng: random.Random) -> Iterator[Kill]:
    """Kill the command so often, each time a little further; one in four in its first seconds."""
    for _ in range(kills):
        more = rng.randint(1, min(STEPS // 3, 2 * STEPS // kills)) if rng.random() < 0.75 else 0
        delay = rng.random() * (0.2 if more else 6.0)
        kill, code = stop(corpus, out, signal.SIGKILL, more, delay)
        if code != -signal.SIGKILL:
            return  # it was faster than the signal
        yield kill


def difference(out: Path, other: Path) -> str | None:
    """The first file in which two finished runs differ, or None."""
    return next((name for name in COMPARED if (out / name).read_bytes() != (other / name).read_bytes()), None)


def main() -> int:
    """Read the command line; 0 where nothing differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10, help="how often (10)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        corpus, undisturbed, killed = (
            write_corpus(Path(name)),
            Path(name) / "undisturbed",
            Path(name) / "killed",
        )
        finish(corpus, undisturbed)
        print("kill  after s  records  newest checkpoint  writing one")
        kills = 0
        for kill in kill_often(corpus, killed, options.kills, random.Random(options.seed)):
            kills += 1
            newest = kill.stored[-1] if kill.stored else "-"
            row = f"{kills:4}  {kill.seconds:7.2f}  {kill.recorded:7}  {newest:>17}"
            print(f"{row}  {'yes' if kill.writing else 'no':>11}", flush=True)
        finish(corpus, killed)
        differing = difference(killed, undisturbed)
        print(f"{differing} differs" if differing else f"{kills} kills: {', '.join(COMPARED)} are equal")
        return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
