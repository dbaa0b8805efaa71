"""What the kernels share: the scores of a tile with all their terms, to the base 2, and their gradient."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from ..block_lists import Entry, unpack
from ..blocks import FULL, PARTIAL
from ..terms import Terms
from .biases import DenseInside, Inside, bias_inside
from .call import At, Block, Refs, Walk
from .dropping import Dropping
from .masking import Masking
from .pieces import Frame, Tile
from .plan import LOG2_E
from .products import product


class Scores(NamedTuple):
    """The terms of an attention inside a kernel."""

    frame: Frame
    masking: Masking
    bias: Inside
    dropping: Dropping

    @classmethod
    def of(cls, frame: Frame, terms: Terms) -> "Scores":
        """Of terms that were extended to the plan's lengths."""
        mask, bias = Masking.of(frame, terms.mask), bias_inside(frame, terms.bias)
        return cls(frame, mask, bias, Dropping(frame, terms.dropout))

    def scalars(self) -> dict[str, Array]:
        """What goes to scalar memory."""
        return {**self.masking.scalars(), **self.bias.scalars(), **self.dropping.scalars()}

    def inputs(self) -> dict[str, tuple[Array, Block]]:
        """What is read by blocks."""
        return {**self.masking.inputs(), **self.bias.inputs()}

    def may_be_infinite(self, masked: bool) -> bool:
        """Whether a row of scores may be all -inf."""
        return masked or isinstance(self.bias, DenseInside)

    def scores(self, q: Array, k: Array, refs: Refs, tile: Tile, masked: bool) -> tuple[Array, Array | None]:
        """Scores to the base 2, -inf where hidden, and the tanh of the soft cap if there is one."""
        plan = self.frame.plan
        left, right = (k, q) if self.frame.keys_first else (q, k)
        scores = product(left, right, transposed=True) * (plan.scale * plan.unit)
        scores = scores + self.bias.tile(refs, tile)
        bent = None
        if plan.soft_cap is not None:
            bent = jnp.tanh(scores)
            scores = bent * (plan.soft_cap * LOG2_E)
        return (self.masking.hide(scores, refs, tile) if masked else scores), bent

    def gradient(
        self, weights: Array, d_weights: Array, delta: Array, bent: Array | None, refs: Refs, tile: Tile
    ) -> Array:
        """Of the loss by the biased scores, from that by the weights after dropout."""
        d_scores = weights * (self.dropping.kept(d_weights, refs, tile) - delta)
        return d_scores if bent is None else d_scores * (1 - bent * bent)

    def visit(self, walk: Walk, entry: Entry, at: At, body: Callable[[Tile, bool], Any]) -> None:
        """Run `body` for each head and chunk of a tile, told whether the mask matters.

        A kind of tile that a list made in NumPy has not is no part of the kernel.
        """
        known = set(np.unique(unpack(walk.lists).kind)) if isinstance(walk.lists, np.ndarray) else None
        for kind in (PARTIAL, FULL):
            if known is not None and kind not in known:
                continue

            @pl.when(entry.kind == kind)
            def _(masked: bool = kind == PARTIAL) -> None:
                def of_head(head: Any, carry: None = None) -> None:
                    for chunk in range(self.frame.chunks):
                        body(self.frame.tile(at, head, chunk), masked)

                if self.frame.heads == 1:
                    of_head(0)
                else:
                    lax.fori_loop(0, self.frame.heads, of_head, None)
