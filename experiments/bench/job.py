"""What every contender trains: a GPT-2-style decoder on random tokens, with AdamW. Imports no framework.

`WrittenJob` is what it has in common with the other jobs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np

from ... import InputError

BATCHES = 4  # drawn once and taken in turn, so that drawing is not measured


@dataclass(frozen=True)
class WrittenJob:
    """A job as plain numbers, text and tuples of these, which another process reads."""

    def require_positive(self, *names: str) -> None:
        """Raise `InputError` for the first of these fields that is below 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")

    def to_json(self) -> str:
        """All fields, for another process."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The job that `to_json` wrote."""
        fields = json.loads(text)
        return cls(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        )


@dataclass(frozen=True)
class DecoderJob(WrittenJob):
    """Sizes of the decoder and of its batch, and the optimizer's numbers.

    The decoder is pre-norm, with learned positions, tanh-GELU, biases and a tied head, in float32; weight
    decay acts on matrices and tables only. Raises `InputError` for sizes that fit no decoder.
    """

    layers: int = 6
    width: int = 384
    heads: int = 6
    length: int = 512
    batch: int = 8
    vocab: int = 8192
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        self.require_positive("layers", "width", "heads", "length", "batch", "vocab")
        if self.width % self.heads:
            raise InputError(f"width {self.width} is not a multiple of {self.heads} heads")

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.length

    def batches(self, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
        """Pairs of tokens and targets, int32 `[B, T]` each."""
        rng = np.random.default_rng(seed)
        drawn = rng.integers(0, self.vocab, (BATCHES, self.batch, self.length + 1), dtype=np.int32)
        return [(rows[:, :-1], rows[:, 1:]) for rows in drawn]

    def products(self) -> Iterator[tuple[int, tuple[int, int, int]]]:
        """How often a step needs a matrix product, and its sizes (m, k, n); attention's are left out.

        Each projection `[N, a] x [a, b]` of the forward pass has two of its size in the backward pass: the
        gradient of its input and that of its kernel.
        """
        rows, width = self.tokens, self.width
        projections = (
            (4 * self.layers, width, width),
            (self.layers, width, 4 * width),
            (self.layers, 4 * width, width),
            (1, width, self.vocab),
        )
        for count, a, b in projections:
            yield from ((count, (rows, a, b)), (count, (rows, b, a)), (count, (a, rows, b)))
