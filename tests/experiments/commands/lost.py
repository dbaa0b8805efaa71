"""Kill one of several processes of `modicum train`, see how the others end, and go on with fewer.

    python tests/experiments/commands/lost.py --processes 4 --left 2 --victim 1

Each process has `8 / processes` simulated devices. Prints how long the others took to end, what they said,
and how far the losses of the resumed run are from those of one process left alone.
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

STEPS = 40
OPTIONS = ["--length", 16, "--batch", 8, "--vocab", 300, "--steps", STEPS, "--evaluate-every", 0, "--scan"]
OPTIONS += ["--checkpoint-every", 5]


class Lost(NamedTuple):
    """Seconds until all others had ended, their exit codes and errors, and the last step on disk."""

    seconds: float
    codes: list[int]
    errors: list[str]
    step: int


def write_corpus(folder):
    rng = random.Random(0)
    words = ["small", "parts", "matter", "most", "neurons", "fire", "rarely", "and", "few", "change", "much"]
    file = folder / "corpus.txt"
    file.write_text("\n".join(" ".join(rng.choices(words, weights=range(1, 12), k=12)) for _ in range(300)))
    return file


def start(corpus, out, index, count, coordinator, devices, mesh):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(corpus.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, "-m", "modicum", "train", corpus, "--out", out, *OPTIONS, *mesh]
    if count > 1:
        command += ["--coordinator", coordinator, "--processes", count, "--process", index]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(word) for word in command], env=environment, **pipes)


def together(corpus, out, count, devices, mesh):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    return [start(corpus, out, index, count, coordinator, devices, mesh) for index in range(count)]


def checkpoints(out):
    folder = out / "checkpoints"
    return (
        sorted(int(each.name) for each in folder.iterdir() if each.name.isdigit()) if folder.is_dir() else []
    )


def lose_one(corpus, out, count, victim, devices, mesh, patience=200):
    """Start `count` processes, kill one after the second checkpoint, wait for the others."""
    running = together(corpus, out, count, devices, mesh)
    try:
        until = time.monotonic() + patience
        while len(checkpoints(out)) < 2:
            if time.monotonic() > until or any(each.poll() is not None for each in running):
                raise SystemExit("the run did not come to its second checkpoint")
            time.sleep(0.05)
        running[victim].kill()
        killed = time.monotonic()
        others = [each for each in running if each is not running[victim]]
        errors = [each.communicate(timeout=patience)[1] for each in others]
        seconds = time.monotonic() - killed
    finally:
        for each in running:
            each.kill()
    return Lost(seconds, [each.returncode for each in others], errors, checkpoints(out)[-1])


def finish(corpus, out, count, devices, mesh):
    """Run to the end; the losses by step, of the last time each was computed."""
    running = together(corpus, out, count, devices, mesh)
    for each in running:
        error = each.communicate(timeout=240)[1]
        if each.returncode:
            raise SystemExit(f"exit code {each.returncode}: {error[-2000:]}")
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def mesh_of(devices, zero):
    return ["--mesh", f"data={devices}", "--zero", zero]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--left", type=int, default=1)
    parser.add_argument("--victim", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = write_corpus(folder)
        each = 8 // given.processes
        lost = lose_one(corpus, folder / "lost", given.processes, given.victim, each, mesh_of(8, 3))
        print(f"killed process {given.victim} of {given.processes}: the others ended in {lost.seconds:.1f} s")
        for code, error in zip(lost.codes, lost.errors):
            print(f"  exit code {code}: {error.strip()}")
        resumed = finish(corpus, folder / "lost", given.left, each, mesh_of(each * given.left, 1))
        alone = finish(corpus, folder / "alone", 1, 1, [])
        far = [abs(resumed[step] - alone[step]) for step in sorted(alone)]
        near = max(far[: lost.step + 20])
        print(
            f"resumed after step {lost.step} on {given.left}: losses within {near:.1e} of one process's 20 "
            f"steps later, {max(far):.1e} after {STEPS}"
        )
        return 0 if near < 1e-3 and sorted(resumed) == sorted(alone) else 1


if __name__ == "__main__":
    raise SystemExit(main())
