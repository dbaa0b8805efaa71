"""Prompts of unequal lengths as one array, with the padding on the side where it is wanted.

A decoder's cache wants it on the left: the last column is then every row's last token, and tokens that
follow are as far from it in the array as in the text. Everything here runs on the host, in NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

from ... import InputError

Tokens = Any
"""One row of ids, rows of unequal lengths, or an integer array `[T]` or `[B, T]`."""


def as_rows(tokens: Tokens, name: str = "tokens") -> tuple[np.ndarray, np.ndarray]:
    """`(tokens, segments)`, int32 `[B, T]`, of what a caller may give; ragged rows are padded on the right.

    Raises InputError for an empty batch or row, and for anything but whole numbers.
    """
    if isinstance(tokens, np.ndarray | jax.Array):
        array = np.asarray(tokens)
        rows = [array] if array.ndim == 1 else list(array)
    else:
        nested = len(tokens) > 0 and isinstance(tokens[0], Sequence | np.ndarray | jax.Array)
        rows = [np.asarray(row) for row in (tokens if nested and np.ndim(tokens[0]) else [tokens])]
    if not rows or any(row.ndim != 1 or not row.size for row in rows):
        raise InputError(f"{name}: every row needs at least one token; use [T], [B, T] or a list of rows")
    if any(not np.issubdtype(row.dtype, np.integer) for row in rows):
        raise InputError(f"{name}: have type {rows[0].dtype}; tokens are whole numbers")
    width = max(row.size for row in rows)
    out, segments = np.zeros((2, len(rows), width), np.int32)
    for index, row in enumerate(rows):
        out[index, : row.size], segments[index, : row.size] = row, 1
    return out, segments


def is_single(tokens: Tokens) -> bool:
    """Whether a caller gave one row without a batch axis."""
    return np.ndim(tokens[0]) == 0 if len(tokens) else False


def check_segments(tokens: np.ndarray, segments: Any) -> np.ndarray:
    """`segments` as int32 `[B, T]` beside `tokens [B, T]`: 0 at padding, which is at a row's ends only."""
    array = np.asarray(segments, np.int32)
    if array.shape != tokens.shape:
        raise InputError(f"segments have shape {array.shape}; beside tokens it must be {tokens.shape}")
    real = array != 0
    if not real.any(1).all():
        raise InputError(f"row {int(np.argmin(real.any(1)))} of segments is all padding (0)")
    starts = np.diff(np.pad(real, ((0, 0), (1, 0))).astype(np.int8), axis=1) == 1
    if (starts.sum(1) > 1).any():
        row = int(np.argmax(starts.sum(1) > 1))
        raise InputError(f"row {row} of segments has padding (0) between real tokens; pad at the ends only")
    return array


def moved(tree: Any, segments: np.ndarray, width: int, side: Literal["left", "right"]) -> Any:
    """Arrays `[B, T, ...]` of a pytree as `[B, width, ...]`, padding (zeros) on `side`.

    `segments [B, T]` says where the real columns of each row are. Pad it by the same function.
    """
    real = np.asarray(segments) != 0
    starts, counts = real.argmax(1), real.sum(1)
    if counts.max() > width:
        raise InputError(f"{counts.max()} tokens do not fit into {width} columns")

    def move(leaf: Any) -> np.ndarray:
        array = np.asarray(leaf)
        if array.shape[:2] != real.shape:
            raise InputError(f"an input has shape {array.shape}; its first axes must be {real.shape}, [B, T]")
        out = np.zeros((array.shape[0], width, *array.shape[2:]), array.dtype)
        for row, (start, count) in enumerate(zip(starts, counts)):
            first = width - count if side == "left" else 0
            out[row, first : first + count] = array[row, start : start + count]
        return out

    return jax.tree.map(move, tree)


def fill_rows(tree: Any, rows: int) -> Any:
    """Arrays `[B, ...]` of a pytree with their last row repeated up to `rows` rows."""

    def fill(leaf: Any) -> np.ndarray:
        array = np.asarray(leaf)
        return np.concatenate([array, np.repeat(array[-1:], rows - len(array), 0)])

    return jax.tree.map(fill, tree)
