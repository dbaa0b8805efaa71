"""A mask inside a kernel: its arrays as operands, and which pairs of a tile it allows."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from ..masks import Mask
from ..operands import Axes, Operand, mask_operands, predicate, rebuilt
from .call import Block, Refs
from .pieces import Frame, Piece, Tile


class Masking(NamedTuple):
    """The operands of a mask; numbers a batch row go to scalar memory."""

    frame: Frame
    mask: Mask
    operands: list[Operand]

    @classmethod
    def of(cls, frame: Frame, mask: Mask) -> "Masking":
        """Of a mask that was extended to the plan's lengths."""
        return cls(frame, mask, mask_operands(mask, frame.plan.queries, frame.plan.keys))

    def scalars(self) -> dict[str, Array]:
        """The numbers, int32."""
        found = self._named()
        return {n: o.array.astype(jnp.int32) for n, o in found.items() if o.axes is Axes.NUMBER}

    def inputs(self) -> dict[str, tuple[Array, Block]]:
        """The other arrays."""
        pieces = {n: Piece(self.frame, o) for n, o in self._named().items() if o.axes is not Axes.NUMBER}
        return {name: piece.input() for name, piece in pieces.items()}

    def hide(self, scores: Array, refs: Refs, tile: Tile) -> Array:
        """The scores of a tile, -inf where the mask does not allow the pair."""
        pieces = iter([self._read(name, operand, refs, tile) for name, operand in self._named().items()])
        mask = rebuilt(self.mask, pieces)
        allowed = predicate(mask, tile.row, tile.column, self.frame.shape, self.frame.keys_first)
        return jnp.where(allowed, scores[None, None], -jnp.inf)[0, 0]

    def _named(self) -> dict[str, Operand]:
        return {f"mask{i}": operand for i, operand in enumerate(self.operands)}

    def _read(self, name: str, operand: Operand, refs: Refs, tile: Tile) -> Any:
        if operand.axes is Axes.NUMBER:
            return refs.scalars[name][tile.at.batch if operand.array.size > 1 else 0]
        return Piece(self.frame, operand).load(refs.inputs[name], tile)
