"""What every contender generates: the same checkpoint, the same random prompts, greedily. No framework."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .job import WrittenJob

MATRIX = (8192, 16_384)
"""A float32 matrix of 512 MiB, larger than any cache: reading it measures the memory's rate."""


@dataclass(frozen=True)
class GenerationJob(WrittenJob):
    """A checkpoint's folder, its vocabulary, and how many tokens go in and come out of each row."""

    folder: str
    vocab: int
    prompt: int = 128
    new: int = 64

    def __post_init__(self) -> None:
        self.require_positive("vocab", "prompt", "new")

    def prompts(self, batch: int) -> np.ndarray:
        """Random ids, int32 `[batch, prompt]`."""
        return np.random.default_rng(batch).integers(0, self.vocab, (batch, self.prompt), dtype=np.int32)
