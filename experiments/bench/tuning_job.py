"""What every contender tunes: a published encoder to two labels, by one method. Imports no framework."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from ... import InputError
from .job import WrittenJob

TuningMethod = Literal["lora", "bitfit", "full"]
LABELS = 2


@dataclass(frozen=True)
class TuningJob(WrittenJob):
    """A checkpoint's folder, the file of the rows, sizes, and the numbers of method and optimizer.

    Rows are full, so that nobody needs a mask; the classifier is a linear layer on the pretrained pooler.
    Its initial kernel and LoRA's are drawn here, so that all contenders start at the same numbers. No
    dropout; weight decay acts on matrices only. Raises `InputError` for sizes that fit no encoder.
    """

    checkpoint: str
    rows: str
    layers: int
    width: int
    heads: int
    hidden: int
    method: TuningMethod = "lora"
    batch: int = 16
    length: int = 128
    rank: int = 8
    alpha: int = 16
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0

    def __post_init__(self) -> None:
        self.require_positive("layers", "width", "heads", "hidden", "batch", "length", "rank")
        if self.width % self.heads:
            raise InputError(f"width {self.width} is not a multiple of {self.heads} heads")
        if self.rank > self.width:
            raise InputError(f"rank={self.rank} exceeds the width {self.width}")
        if self.method not in get_args(TuningMethod):
            raise InputError(f"method {self.method!r} is unknown; valid: {', '.join(get_args(TuningMethod))}")

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.length

    def batches(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Pairs of tokens `[B, T]` and labels `[B]`, int32."""
        with np.load(Path(self.rows)) as file:
            tokens, labels = file["tokens"], file["labels"]
        count = len(labels) // self.batch
        return [
            (tokens[i * self.batch : (i + 1) * self.batch], labels[i * self.batch : (i + 1) * self.batch])
            for i in range(count)
        ]

    def classifier(self) -> np.ndarray:
        """The classifier's initial kernel `[D, labels]`; its bias starts at zero."""
        draw = np.random.default_rng(0).normal(0.0, 0.02, (self.width, LABELS))
        return draw.astype(np.float32)

    def down_projections(self) -> np.ndarray:
        """LoRA's initial A of each layer's query and value, `[L, 2, D, rank]`; its B starts at zero."""
        bound = self.width**-0.5
        drawn = np.random.default_rng(1).uniform(-bound, bound, (self.layers, 2, self.width, self.rank))
        return drawn.astype(np.float32)

    def products(self) -> Iterator[tuple[int, tuple[int, int, int]]]:
        """How often a step needs a matrix product of weights, and its sizes (m, k, n); attention's are apart.

        A forward product `[N, a] x [a, b]` has the gradient of its input and, where the kernel is trained,
        that of the kernel. A delta has no use for the input's gradient below the first layer's projections.
        """
        rows, width, full = self.tokens, self.width, self.method == "full"
        for a, b, count in ((width, width, 4), (width, self.hidden, 1), (self.hidden, width, 1)):
            yield self.layers * count, (rows, a, b)
            below = 3 if a == b and self.method == "lora" else 0  # query, key and value of the first layer
            yield self.layers * count - below, (rows, b, a)
            if full:
                yield self.layers * count, (a, rows, b)
        if self.method == "lora":
            sites = 2 * self.layers
            yield 2 * sites, (rows, width, self.rank)  # down, and the gradient of what it gave
            yield 2 * sites - 2, (rows, self.rank, width)  # up, and the input's gradient but in the first
            yield 2 * sites, (width, rows, self.rank)  # gradients of A and of B

    @property
    def flops(self) -> float:
        """Multiplications and additions of one step of the model as it is written.

        Attention has two products forward and four backward of `[T, T]` with the heads' width.
        """
        weights = sum(2.0 * count * m * k * n for count, (m, k, n) in self.products())
        return weights + 6 * 2.0 * self.layers * self.tokens * self.length * self.width
