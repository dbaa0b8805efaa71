"""What a model needs to know of its prompts beside their tokens: positions, and who sees whom.

prepared = cpm_ant.prepare(rows, model.config)
logits = model.apply(params, prepared.tokens, **prepared.arguments)
generated = generate(model, params, prepared.tokens, segments=prepared.segments, inputs=prepared.inputs, ...)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ... import InputError
from ..kernels import Causal, Keys, Mask, Queries

Rows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Prepared:
    """Prompts padded on the left: `tokens` and `segments` int32 `[B, T]`; segments are 1, and 0 at padding.

    `positions` are the model's, arrays `[B, T, ...]`; `mask` makes the mask for segments of any padding on
    the left. The first `added` tokens of each row are the model's own, not the caller's.
    """

    tokens: np.ndarray
    segments: np.ndarray
    positions: Any
    mask: Callable[[Any], Mask]
    added: int = 0

    @property
    def arguments(self) -> dict[str, Any]:
        """For `Transformer.apply`, beside the tokens."""
        return {"segments": self.segments, "positions": self.positions, "mask": self.mask(self.segments)}

    @property
    def inputs(self) -> dict[str, Any]:
        """For `generate`, beside tokens and segments."""
        return {"positions": self.positions, "mask": self.mask}

    def own(self, outputs: Any) -> Any:
        """Outputs `[B, T - added, ...]` of the caller's tokens, in the last columns of each row."""
        return outputs[:, self.added :]


def padded(rows: Sequence[Any], length: int = 0) -> Any:
    """One pytree of arrays `[B, T, ...]` from trees of arrays `[n, ...]`, zeros on the left.

    T is `length`, or that of the longest row.
    """
    longest = max(len(jax.tree.leaves(row)[0]) for row in rows)
    if length and longest > length:
        raise InputError(f"a row has {longest} tokens; length={length} must be at least that")

    def stack(*leaves: Any) -> np.ndarray:
        arrays = [np.asarray(leaf, np.int32) for leaf in leaves]
        out = np.zeros((len(arrays), length or longest, *arrays[0].shape[1:]), np.int32)
        for row, array in enumerate(arrays):
            out[row, out.shape[1] - len(array) :] = array
        return out

    return jax.tree.map(stack, *rows)


def checked(rows: Rows, what: str = "rows") -> list[np.ndarray]:
    """Rows of ids as arrays; raises `InputError` for no rows, empty ones, and what is no whole number."""
    arrays = [np.asarray(row) for row in rows]
    if not arrays:
        raise InputError(f"{what} is empty; at least one row of ids is needed")
    for index, array in enumerate(arrays):
        if array.ndim != 1 or not array.size or not np.issubdtype(array.dtype, np.integer):
            raise InputError(f"{what}[{index}] is {array.tolist()!r}; it must be a list of whole numbers")
    return arrays


def given_first(given: Any) -> Mask:
    """CPM's rule for bool `given [B, T]`: what is given is seen by all, the rest by what is later of it."""
    return Keys(given) | (Queries(~given) & Causal())
