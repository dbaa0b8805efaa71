"""`modicum bench train`: ours beside its peers, measured on this machine in one run."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ... import InputError


@dataclass(frozen=True)
class Bench:
    """Measure our train step beside the same decoder in PyTorch, eager and compiled, on this machine's CPU.

    Each contender has a process of its own and they take turns, round by round. Reported are medians, wall
    and CPU seconds (the latter say more on a shared machine), and which part of the machine's matrix product
    rate the model's arithmetic reaches.
    """

    what: tyro.conf.Positional[Literal["train"]]
    """What to measure."""
    layers: int = 6
    width: int = 384
    heads: int = 6
    length: int = 512
    """Tokens of a row."""
    batch: int = 8
    """Rows of a step."""
    vocab: int = 8192
    rounds: int = 5
    """Turns of each contender."""
    steps: int = 1
    """Train steps of one turn."""
    contenders: tuple[Literal["ours", "eager", "compiled"], ...] = ("ours", "eager", "compiled")
    """Who takes part: ours, PyTorch eager, PyTorch compiled."""
    threads: int = 0
    """Processors for each contender; 0: all."""
    out: Path | None = None
    """Folder for the tables and for every single timing."""

    def run(self) -> int:
        """Print the tables."""
        from ..bench.job import DecoderJob
        from ..bench.training import measure_training
        from ..bench.training_report import summary, write

        if self.out is not None and self.out.exists() and not self.out.is_dir():
            raise InputError(f"out={self.out} is a file; give a folder")
        job = DecoderJob(self.layers, self.width, self.heads, self.length, self.batch, self.vocab)
        seen = measure_training(
            job,
            rounds=self.rounds,
            steps=self.steps,
            contenders=self.contenders,
            threads=self.threads,
            report=lambda line: print(line, file=sys.stderr, flush=True),
        )
        print(summary(seen))
        if self.out is not None:
            write(seen, self.out)
        return 0
