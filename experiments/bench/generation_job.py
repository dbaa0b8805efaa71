"""What every contender generates: the same checkpoint, the same random prompts, greedily. No framework."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import numpy as np

from ... import InputError

MATRIX = (8192, 16_384)
"""A float32 matrix of 512 MiB, larger than any cache: reading it measures the memory's rate."""


@dataclass(frozen=True)
class GenerationJob:
    """A checkpoint's folder, its vocabulary, and how many tokens go in and come out of each row."""

    folder: str
    vocab: int
    prompt: int = 128
    new: int = 64

    def __post_init__(self) -> None:
        for name in ("vocab", "prompt", "new"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")

    def prompts(self, batch: int) -> np.ndarray:
        """Random ids, int32 `[batch, prompt]`."""
        return np.random.default_rng(batch).integers(0, self.vocab, (batch, self.prompt), dtype=np.int32)

    def to_json(self) -> str:
        """All fields, for another process."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> GenerationJob:
        """The job that `to_json` wrote."""
        return cls(**json.loads(text))
