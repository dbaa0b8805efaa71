"""What is static about a call: sizes, and how the score matrix is cut for each of the kernels."""

import dataclasses
import math
from collections.abc import Collection
from typing import Any, NamedTuple

from ...kernels.blocks import Grid

LANES = 128  # numbers in a row of a vector register; blocks are multiples of it
SUBLANES = 8  # rows of a vector register of 32-bit numbers
LOG2_E = math.log2(math.e)


class Blocks(NamedTuple):
    """Queries and keys of a tile, and how many keys are worked on at once."""

    rows: int
    columns: int
    chunk: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of a padded call, its blocks, and the constants of the scores.

    `fused`: one kernel has the gradients of q, k and v. Its blocks are `backward`, and the bias's too.
    """

    batch: int
    heads: int
    groups: int
    queries: int
    keys: int
    width: int
    value_width: int
    forward: Blocks
    backward: Blocks
    query_gradient: Blocks
    key_gradients: Blocks
    fused: bool
    scale: float
    soft_cap: float | None
    lanes: int
    interpret: Any

    @property
    def repeats(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.groups

    @property
    def unit(self) -> float:
        """What scores are multiplied by first: base 2 for the exponential, or what soft cap's tanh takes."""
        return LOG2_E if self.soft_cap is None else 1 / self.soft_cap

    def grid(self, blocks: Blocks) -> Grid:
        """The score matrix in tiles of these blocks."""
        return Grid(self.queries, self.keys, blocks.rows, blocks.columns)


def padded_length(length: int, block: int, lanes: int) -> int:
    """`length` rounded up so that blocks near `block` fill it, with little padding."""
    count = -(-length // block)
    return count * _round_up(-(-length // count), lanes)


def common_length(length: int, blocks: Collection[int], lanes: int) -> int:
    """The padded length of which kernels with different blocks all have some near their own.

    1664 is 13 * 128: filled by one block near 2048, it leaves a kernel with blocks of 1024 nothing but 128.
    """
    padded = [padded_length(length, block, lanes) for block in sorted(set(blocks), reverse=True)]
    return max(padded, key=lambda size: min(fitting_block(size, block, lanes) / block for block in blocks))


def fitting_block(length: int, block: int, lanes: int) -> int:
    """The greatest multiple of `lanes` up to `block` that divides a padded length."""
    return next(size for size in range(max(block // lanes, 1) * lanes, 0, -lanes) if length % size == 0)


def padded_width(width: int, lanes: int) -> int:
    """Head widths are a half of the lanes, or a multiple of them."""
    return lanes // 2 if width <= lanes // 2 else _round_up(width, lanes)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
