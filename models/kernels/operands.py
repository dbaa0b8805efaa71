"""How a mask's arrays become operands of a hand-written kernel, which rebuilds the mask inside.

A kernel receives pieces of arrays, cut by its grid, and may index nothing itself. So each array of a mask is
brought to a standard form that says which axes it has; inside the kernel the mask is built again around the
pieces, and its own `predicate` is evaluated with `Side`s in the place of spans, whose cutting does nothing.
No rule of a mask is written twice.
"""

import dataclasses
import enum
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
from jax import Array, lax

from .flags import Keys, Queries
from .masks import And, Causal, Dense, Full, Lengths, Mask, Not, Or, Prefix, Segments, Window
from .spans import Span


class Axes(enum.Enum):
    """What an array has an element for: a batch row, a query, a key, or each pair of the two."""

    NUMBER = enum.auto()
    QUERIES = enum.auto()
    KEYS = enum.auto()
    PAIRS = enum.auto()


FIELDS: dict[type[Mask], dict[str, Axes]] = {
    Full: {},
    Causal: {"offset": Axes.NUMBER},
    Window: {"offset": Axes.NUMBER},
    Prefix: {"lengths": Axes.NUMBER, "offset": Axes.NUMBER},
    Lengths: {"lengths": Axes.NUMBER},
    Segments: {"query": Axes.QUERIES, "key": Axes.KEYS},
    Queries: {"flags": Axes.QUERIES},
    Keys: {"flags": Axes.KEYS},
    Dense: {"allowed": Axes.PAIRS},
}


class Operand(NamedTuple):
    """Standard form: numbers `[B or 1]`, pairs `[B or 1, H or 1, T, S]`, lines `[B or 1, H or 1, 1, T or S]`.

    Queries and keys alike lie along the last axis, which chips with wide vector registers store compactly.
    """

    axes: Axes
    array: Array


def unknown_mask(mask: Mask) -> str | None:
    """The reason why a kernel cannot rebuild this mask, or None."""
    match mask:
        case And(parts=parts) | Or(parts=parts):
            return next(filter(None, map(unknown_mask, parts)), None)
        case Not(part=part):
            return unknown_mask(part)
        case _:
            return None if type(mask) in FIELDS else f"the kernel cannot rebuild a {type(mask).__name__} mask"


def replace_arrays(mask: Mask, replace: Callable[[Any, Axes], Any]) -> Mask:
    """The same expression with `replace(array, axes)` in the place of each array, in a fixed order."""
    match mask:
        case And(parts=parts):
            return And(tuple(replace_arrays(part, replace) for part in parts))
        case Or(parts=parts):
            return Or(tuple(replace_arrays(part, replace) for part in parts))
        case Not(part=part):
            return Not(replace_arrays(part, replace))
        case _:
            fields = {name: (getattr(mask, name), axes) for name, axes in FIELDS[type(mask)].items()}
            arrays = {name: replace(*f) for name, f in fields.items() if not isinstance(f[0], int)}
            return dataclasses.replace(cast(Any, mask), **arrays)


def mask_operands(mask: Mask, queries: int, keys: int) -> list[Operand]:
    """The arrays of a mask that was extended to these lengths, in the order of `replace_arrays`."""
    found: list[Operand] = []
    replace_arrays(mask, lambda array, axes: found.append(standard(array, axes, queries, keys)))
    return found


def standard(array: Any, axes: Axes, queries: int, keys: int) -> Operand:
    """An array of a mask or bias in standard form."""
    array = jnp.asarray(array)
    if axes is Axes.NUMBER:
        return Operand(axes, array.reshape(-1))
    if axes is not Axes.PAIRS:
        array = array[:, None, None, :]
    elif array.shape[2] == 1:
        axes = Axes.KEYS
    elif array.shape[3] == 1:
        axes, array = Axes.QUERIES, array.swapaxes(2, 3)
    full = {Axes.QUERIES: (1, queries), Axes.KEYS: (1, keys), Axes.PAIRS: (queries, keys)}[axes]
    return Operand(axes, jnp.broadcast_to(array, (*array.shape[:2], *full)))


def rebuilt(mask: Mask, pieces: Iterator[Any]) -> Mask:
    """The mask around what the kernel has of its arrays: scalars, and pieces spread over a tile."""

    def replace(_: Any, axes: Axes) -> Any:
        piece = next(pieces)
        return piece if axes is Axes.NUMBER else piece[None, None] if axes is Axes.PAIRS else Line(piece)

    return replace_arrays(mask, replace)


@dataclasses.dataclass(frozen=True)
class Line:
    """Numbers along one side of a tile, spread over it: what masks index as `[:, None]` or `[None, :]`.

    `tile` is two-dimensional and lies as the scores of the kernel do, perhaps keys first. Kernels know no
    vectors of one axis, so indexing only adds axes in front.
    """

    tile: Array

    def __getitem__(self, index: tuple[slice | None, ...]) -> Array:
        """The tile with as many axes as the index has."""
        return self.tile.reshape((1,) * (len(index) - 2) + self.tile.shape)

    def __lt__(self, bound: Any) -> Array:
        return self.tile[None, None] < bound


class Side(NamedTuple):
    """Stands for the span of a tile's queries or keys: `axis` is where these lie in a tile of `shape`."""

    start: Any
    axis: int
    shape: tuple[int, int]
    is_key: bool

    @property
    def size(self) -> int:
        """Of the axis that would be the keys', if a tile lay as masks write it: they ask for a shape."""
        return self.shape[int(self.is_key)]

    def indices(self) -> Line:
        """Global indices."""
        return Line(lax.broadcasted_iota(jnp.int32, self.shape, self.axis) + self.start)

    def cut(self, piece: Any, axis: int) -> Any:
        """The piece: the kernel's grid has cut it."""
        return piece


def predicate(mask: Mask, row: Any, column: Any, shape: tuple[int, int], keys_first: bool) -> Array:
    """Whether each pair of a tile of `shape` is allowed, bool `[1, 1, *shape]`, keys first if asked for.

    `mask` is rebuilt around pieces; `row` and `column` are the first query and key of the tile.
    """
    rows = Side(row, int(keys_first), shape, is_key=False)
    columns = Side(column, int(not keys_first), shape, is_key=True)
    return mask.predicate(cast(Span, rows), cast(Span, columns))
