"""What every contender attends to: the same random arrays under the same mask and bias. No framework."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ... import InputError
from .job import WrittenJob

MASKS = ("causal", "full", "window", "packed")
BIASES = ("none", "dense", "bucketed", "alibi")
BACKWARD = 2.5
"""Products of the backward pass over those of the forward pass: five of their size against two."""
TILE = 128
"""The side of the tiles whose live fraction is told."""
BUCKETS = 32


@dataclass(frozen=True)
class AttentionJob(WrittenJob):
    """Sizes of one attention but its length; raises `InputError` for sizes that fit none.

    A window shows each query itself and `window` keys before it; packed rows have `documents` of random
    lengths, causal each. A bias has a number a head for each pair, distance bucket, or unit of distance.
    """

    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    width: int = 64
    mask: str = "causal"
    bias: str = "none"
    dtype: str = "float32"
    window: int = 1024
    documents: int = 8

    def __post_init__(self) -> None:
        self.require_positive("batch", "heads", "kv_heads", "width", "documents")
        if self.heads % self.kv_heads:
            raise InputError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        for name, valid in (("mask", MASKS), ("bias", BIASES)):
            if getattr(self, name) not in valid:
                raise InputError(f"{name}={getattr(self, name)} is unknown; valid are {', '.join(valid)}")

    def arrays(self, length: int) -> list[np.ndarray]:
        """q and the output's cotangent `[B, T, H, K]`, k and v `[B, T, G, K]`, float32."""
        rng = np.random.default_rng(length)
        heads = (self.heads, self.heads, self.kv_heads, self.kv_heads)
        shapes = [(self.batch, length, count, self.width) for count in heads]
        return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]

    def segments(self, length: int) -> np.ndarray:
        """Document numbers from 1, int32 `[1, T]`."""
        rng = np.random.default_rng(self.documents)
        ends = rng.choice(np.arange(1, length), min(self.documents, length) - 1, replace=False)
        starts = np.zeros(length, np.int32)
        starts[ends] = 1
        return (np.cumsum(starts) + 1).astype(np.int32)[None]

    def first_keys(self, length: int) -> np.ndarray:
        """The first key that each query sees, `[T]`; from there on it sees all up to its last."""
        queries = np.arange(length)
        match self.mask:
            case "window":
                return np.maximum(queries - self.window, 0)
            case "packed":
                ids = self.segments(length)[0]
                return np.searchsorted(ids, ids)
            case _:
                return np.zeros(length, int)

    def last_keys(self, length: int) -> np.ndarray:
        """The last key that each query sees, `[T]`."""
        return np.full(length, length - 1) if self.mask == "full" else np.arange(length)

    def flops(self, length: int, backward: bool) -> float:
        """Of the products over pairs that are seen, as many as no implementation can avoid."""
        pairs = (self.last_keys(length) - self.first_keys(length) + 1).sum()
        forward = 4.0 * self.batch * self.heads * self.width * float(pairs)
        return forward * (1 + BACKWARD) if backward else forward

    def live_fraction(self, length: int) -> float:
        """The share of tiles of 128 x 128 in which some pair is seen."""
        starts = np.arange(0, length, TILE)
        first = np.minimum.reduceat(self.first_keys(length), starts) // TILE
        last = np.maximum.reduceat(self.last_keys(length), starts) // TILE
        return float((last - first + 1).sum() / len(starts) ** 2)

    def table(self) -> np.ndarray:
        """Numbers of a bucketed bias, float32 `[buckets, H]`."""
        return np.random.default_rng(0).standard_normal((BUCKETS, self.heads), dtype=np.float32)

    def dense(self, length: int) -> np.ndarray:
        """Numbers of a dense bias, float32 `[1, H, T, T]`, the same for all rows."""
        rng = np.random.default_rng(1)
        return rng.standard_normal((1, self.heads, length, length), dtype=np.float32)
