"""Tiles as a kernel cuts them, and the pieces of arrays that it reads for one."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from ..operands import Axes, Operand
from .call import At, Block
from .plan import Blocks, Plan


class Tile(NamedTuple):
    """A chunk of a tile for one query head: its first query and key, and the chunk's part of the keys."""

    at: At
    head: Any  # among the heads of a step
    row: Any
    column: Any
    keys: slice


class Frame(NamedTuple):
    """How a kernel lays its tiles: `heads` query heads a step, keys along the rows of registers or not."""

    plan: Plan
    blocks: Blocks
    heads: int
    keys_first: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Of a chunk."""
        rows, chunk = self.blocks.rows, self.blocks.chunk
        return (chunk, rows) if self.keys_first else (rows, chunk)

    @property
    def sides(self) -> tuple[int, int]:
        """The axis of the queries and that of the keys."""
        return (1, 0) if self.keys_first else (0, 1)

    @property
    def chunks(self) -> int:
        """How many make a tile."""
        return self.blocks.columns // self.blocks.chunk

    def tile(self, at: At, head: Any, chunk: int) -> Tile:
        """Chunk number `chunk` of the tile at a place."""
        size = self.blocks.chunk
        start = chunk * size
        column = at.column * self.blocks.columns + start
        return Tile(at, head, at.row * self.blocks.rows, column, slice(start, start + size))

    def head(self, tile: Tile) -> Any:
        """The number of the tile's query head."""
        return tile.at.heads * self.heads + tile.head

    def queries(self, width: int) -> Block:
        """A block of `[B, H, T, width]`."""
        return Block((None, self.heads, self.blocks.rows, width), lambda at: (at.batch, at.heads, at.row, 0))

    def keys(self, width: int) -> Block:
        """A block of `[B, G, S, width]`."""
        return Block((None, None, self.blocks.columns, width), lambda at: (at.batch, at.group, at.column, 0))

    def statistics(self) -> Block:
        """A block of `[B, H, 1, T]`: one number a query."""
        return Block((None, self.heads, 1, self.blocks.rows), lambda at: (at.batch, at.heads, 0, at.row))


@dataclasses.dataclass(frozen=True)
class Piece:
    """An array of a mask or bias in standard form, and how a kernel reads it."""

    frame: Frame
    operand: Operand

    def input(self) -> tuple[Array, Block]:
        """Operand and block; bools travel as integers."""
        axes, array = self.operand
        if array.dtype == jnp.bool_:
            array = array.astype(jnp.int8 if axes is Axes.PAIRS else jnp.int32)
        return array, self.block(array.shape)

    def block(self, shape: tuple[int, ...]) -> Block:
        """Of an array whose first two axes, if 1, stand for every batch row and head."""
        axes, blocks = self.operand.axes, self.frame.blocks
        by_batch, by_head = shape[0] > 1, shape[1] > 1
        rows = blocks.rows if axes is Axes.PAIRS else 1
        columns = blocks.rows if axes is Axes.QUERIES else blocks.columns

        def index(at: At) -> tuple[Any, ...]:
            row = at.row if axes is Axes.PAIRS else 0
            column = at.row if axes is Axes.QUERIES else at.column
            return (at.batch if by_batch else 0, at.heads if by_head else 0, row, column)

        return Block((None, self.frame.heads if by_head else 1, rows, columns), index)

    def load(self, ref: Any, tile: Tile) -> Array:
        """What the tile has of it, spread over the tile."""
        axes, array = self.operand
        keys = slice(None) if axes is Axes.QUERIES else tile.keys
        piece = ref[tile.head if array.shape[1] > 1 else 0, :, keys]
        if piece.dtype == jnp.int8:
            piece = piece.astype(jnp.int32)
        along = {Axes.QUERIES: not self.frame.keys_first}.get(axes, self.frame.keys_first)
        piece = jnp.broadcast_to(piece.T if along else piece, self.frame.shape)
        return piece != 0 if array.dtype == jnp.bool_ else piece
