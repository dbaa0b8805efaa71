"""`modicum bench tune-memory|tune-storage`: what deltas save in training and on disk, from shapes alone."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ... import InputError


@dataclass(frozen=True)
class MemoryBench:
    """The memory of a train step, full tuning beside deltas, as XLA compiles it ahead of time.

    Full tuning keeps float32 parameters and computes in bfloat16; a delta's backbone is frozen in bfloat16.
    A chip's memory may be too small: then the compiler's own figure is reported.
    """

    model: tyro.conf.Positional[str] = "cpm-ant-10b"
    """A preset."""
    batch: tuple[int, ...] = (1, 2, 8, 32)
    length: tuple[int, ...] = (512,)
    method: tuple[Literal["full", "lora", "bitfit", "norms", "prefix"], ...] = (
        *("full", "lora", "norms", "prefix"),
    )
    """LoRA of rank 8 on query and value, biases, norms, 64 learned keys and values a layer."""
    remat: tuple[Literal["none", "full", "dots"], ...] = ("full",)
    """What the backward pass computes again: nothing, each layer, all but products."""
    topology: str = ""
    """A TPU to compile for, such as v5p:2x2x1 (needs libtpu, no TPU), heads and widths split over its chips;
    the CPU without."""
    kept: Path | None = None
    """File of what was found, a line a case; those that it has are not compiled again."""

    def run(self) -> int:
        """Print the table."""
        from ..delta_memory import MemoryCase, measure_all, memory_table
        from .progress import notice

        for name in ("batch", "length"):
            if min(getattr(self, name), default=1) < 1:
                raise InputError(f"{name}={min(getattr(self, name))} must be at least 1")
        settings = itertools.product(self.length, self.remat, self.batch, self.method)
        cases = [
            MemoryCase(self.model, method, batch, length, remat) for length, remat, batch, method in settings
        ]
        table = memory_table(measure_all(cases, self.topology, self.kept, notice))
        where = self.topology or "CPU"
        print(f"{table.caption}, {self.model} compiled for {where}:\n\n{table.markdown()}")
        return 0


@dataclass(frozen=True)
class StorageBench:
    """Bytes of many tasks: a copy of the model each, or a backbone and a delta each; from shapes alone."""

    model: tyro.conf.Positional[str] = "gpt3-175b"
    """A preset."""
    tasks: int = 100

    def run(self) -> int:
        """Print the tables."""
        from ..delta_storage import count_stored, storage_text

        if self.tasks < 1:
            raise InputError(f"tasks={self.tasks} must be at least 1")
        print(storage_text(count_stored(self.model), self.tasks))
        return 0
