"""Rows of one length from ids of many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

MULTIPLE = 8
"""Rows are padded to a multiple of this where no length is asked for."""


def filled(values: Sequence[Any] | np.ndarray, length: int, fill: int, dtype: type = np.int32) -> np.ndarray:
    """`values` as an array `[length]`, filled up with `fill`."""
    array: np.ndarray = np.full(length, fill, dtype)
    array[: len(values)] = values
    return array


def token_fields(
    ids: Sequence[int] | np.ndarray, length: int, pad: int, prefix: str = ""
) -> dict[str, np.ndarray]:
    """A row's tokens, segments (1, and 0 for padding) and positions, int32 `[length]` each."""
    inside = np.arange(length) < len(ids)
    return {
        f"{prefix}tokens": filled(ids, length, pad),
        f"{prefix}segments": inside.astype(np.int32),
        f"{prefix}positions": np.where(inside, np.arange(length), 0).astype(np.int32),
    }


def rounded_up(size: int) -> int:
    """The next multiple of `MULTIPLE`."""
    return -(-size // MULTIPLE) * MULTIPLE
