"""Which query may see which key: masks as small expressions, structure static and arrays as leaves.

A mask is written `Causal() & Segments(ids)`; `&`, `|` and `~` combine. Its `predicate` says for a tile
of query and key indices which pairs are allowed, so no `[T, S]` array need exist, and `blocks.py`
derives from the same structure which tiles hold no allowed pair at all.
"""

import functools
import operator
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from ... import InputError
from .spans import Span, pad, relative
from .trees import AnyArray, structural


class Sizes(NamedTuple):
    """The sizes a mask or bias has to fit."""

    batch: int
    heads: int
    queries: int
    keys: int


class Mask:
    """A set of allowed (query, key) pairs for each batch row and head."""

    def predicate(self, rows: Span, columns: Span) -> Array:
        """Whether each query of `rows` may see each key of `columns`: bool `[B or 1, H or 1, t, s]`."""
        raise NotImplementedError

    def mismatch(self, sizes: Sizes) -> str | None:
        """Why the arrays of this mask do not fit `sizes`, or None where they do."""
        return None

    def extended(self, queries: int, keys: int) -> "Mask":
        """This mask with its arrays padded to `queries` and `keys` positions, whatever is allowed there."""
        return self

    def cut(self, rows: Span, columns: Span) -> "Mask":
        """The mask of these queries and keys alone, counted from 0: a part of attention is one by itself."""
        raise NotImplementedError

    def __and__(self, other: "Mask") -> "Mask":
        return And((*_parts(self, And), *_parts(other, And)))

    def __or__(self, other: "Mask") -> "Mask":
        return Or((*_parts(self, Or), *_parts(other, Or)))

    def __invert__(self) -> "Mask":
        return self.part if isinstance(self, Not) else Not(self)


@structural
class Full(Mask):
    """Every query sees every key."""

    def predicate(self, rows: Span, columns: Span) -> Array:
        """All true, `[1, 1, t, s]`."""
        return jnp.ones((1, 1, rows.size, columns.size), bool)

    def cut(self, rows: Span, columns: Span) -> "Full":
        """Itself."""
        return self


@structural
class Causal(Mask):
    """Query i sees key j where `j <= i + offset`.

    `offset` is the position of the first query among the keys: 0 in training, the number of cached keys
    in decoding. An int is static; an int32 array, a scalar or `[B]`, may be traced.
    """

    offset: int | AnyArray = 0

    def predicate(self, rows: Span, columns: Span) -> Array:
        """The triangle."""
        return relative(rows, columns)[None, None] <= per_batch(self.offset)

    def mismatch(self, sizes: Sizes) -> str | None:
        """The offset is a scalar or one number a batch row."""
        return _vector_mismatch("Causal.offset", self.offset, sizes.batch, scalar=True)

    def cut(self, rows: Span, columns: Span) -> "Causal":
        """The triangle moved."""
        return Causal(self.offset + rows.start - columns.start)


@structural
class Window(Mask):
    """Query i sees key j where `i + offset - left <= j <= i + offset + right`; None is without limit.

    `Window(left, 0)` is the causal sliding window that shows each query itself and `left` keys before it.
    """

    left: int | None
    right: int | None
    offset: int | AnyArray = 0

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 0):
                raise InputError(f"Window.{name} is {value!r}; it must be None or an integer of at least 0")

    def predicate(self, rows: Span, columns: Span) -> Array:
        """The band."""
        distance = relative(rows, columns)[None, None] - per_batch(self.offset)
        inside = jnp.ones(distance.shape, bool)
        if self.left is not None:
            inside &= distance >= -self.left
        if self.right is not None:
            inside &= distance <= self.right
        return inside

    def mismatch(self, sizes: Sizes) -> str | None:
        """The offset is a scalar or one number a batch row."""
        return _vector_mismatch("Window.offset", self.offset, sizes.batch, scalar=True)

    def cut(self, rows: Span, columns: Span) -> "Window":
        """The band moved."""
        return Window(self.left, self.right, self.offset + rows.start - columns.start)


@structural
class Prefix(Mask):
    """Prefix language modelling: causal, but the first `lengths[b]` keys are seen by every query.

    `lengths` is int32 `[B]`. Raffel et al. 2020, "Exploring the limits of transfer learning", figure 4.
    """

    lengths: AnyArray
    offset: int | AnyArray = 0

    def predicate(self, rows: Span, columns: Span) -> Array:
        """The triangle and the columns of the prefix."""
        inside = columns.indices() < per_batch(self.lengths)
        return inside | Causal(self.offset).predicate(rows, columns)

    def mismatch(self, sizes: Sizes) -> str | None:
        """One length a batch row."""
        return _vector_mismatch("Prefix.lengths", self.lengths, sizes.batch) or _vector_mismatch(
            "Prefix.offset", self.offset, sizes.batch, scalar=True
        )

    def cut(self, rows: Span, columns: Span) -> "Prefix":
        """What is left of the prefix and the triangle moved."""
        return Prefix(self.lengths - columns.start, self.offset + rows.start - columns.start)


@structural
class Segments(Mask):
    """Packed documents: a query sees the keys with its own id; padding, id 0, is apart from all.

    `query` is int32 `[B, T]` and `key` is int32 `[B, S]`; without `key` they are the same array.
    """

    query: AnyArray
    key: AnyArray | None = None

    def predicate(self, rows: Span, columns: Span) -> Array:
        """Equal and not padding."""
        query = rows.cut(self.query, 1)[:, None, :, None]
        key = columns.cut(self.keys(), 1)[:, None, None, :]
        return (query == key) & (query != 0)

    def keys(self) -> AnyArray:
        """The ids of the keys, `[B, S]`."""
        return self.query if self.key is None else self.key

    def mismatch(self, sizes: Sizes) -> str | None:
        """Both arrays have an id for every position."""
        for name, array, length in (("query", self.query, sizes.queries), ("key", self.keys(), sizes.keys)):
            valid = [(sizes.batch, length), (1, length)]
            if jnp.shape(array) not in valid:
                return f"Segments.{name} has shape {list(jnp.shape(array))}; it must be {list(valid[0])}"
        return None

    def extended(self, queries: int, keys: int) -> "Segments":
        """Padding is padding."""
        return Segments(pad(self.query, 1, queries), pad(self.keys(), 1, keys))

    def cut(self, rows: Span, columns: Span) -> "Segments":
        """The ids of each side."""
        return Segments(rows.cut(self.query, 1), columns.cut(self.keys(), 1))


@structural
class Lengths(Mask):
    """Every query of batch row b sees the first `lengths[b]` keys: int32 `[B]`, or one static int for all."""

    lengths: int | AnyArray

    def predicate(self, rows: Span, columns: Span) -> Array:
        """The columns before the length, `[B or 1, 1, 1, s]`."""
        return columns.indices()[None, None, None, :] < per_batch(self.lengths)

    def mismatch(self, sizes: Sizes) -> str | None:
        """One length a batch row."""
        return _vector_mismatch("Lengths.lengths", self.lengths, sizes.batch, scalar=True)

    def cut(self, rows: Span, columns: Span) -> "Lengths":
        """What is left of the length, perhaps less than nothing."""
        return Lengths(self.lengths - columns.start)


@structural
class Dense(Mask):
    """Any mask as a bool array that broadcasts to `[B, H, T, S]`; True is allowed."""

    allowed: AnyArray

    def predicate(self, rows: Span, columns: Span) -> Array:
        """The tile of the array."""
        return columns.cut(rows.cut(self.allowed, 2), 3)

    def mismatch(self, sizes: Sizes) -> str | None:
        """Four axes, each of full size or 1, and bool."""
        if self.allowed.dtype != jnp.bool_:
            return (
                f"Dense.allowed has type {self.allowed.dtype}; it must be bool, True where a query may look"
            )
        return broadcast_mismatch("Dense.allowed", self.allowed, sizes)

    def extended(self, queries: int, keys: int) -> "Dense":
        """Nothing more is allowed."""
        return Dense(pad(pad(self.allowed, 2, queries), 3, keys))

    def cut(self, rows: Span, columns: Span) -> "Dense":
        """The part of the array."""
        return Dense(columns.cut(rows.cut(self.allowed, 2), 3))


@structural
class And(Mask):
    """The pairs that every part allows."""

    parts: tuple[Mask, ...]

    def predicate(self, rows: Span, columns: Span) -> Array:
        """The intersection."""
        return functools.reduce(operator.and_, (part.predicate(rows, columns) for part in self.parts))

    def mismatch(self, sizes: Sizes) -> str | None:
        """The first part that does not fit."""
        return next(filter(None, (part.mismatch(sizes) for part in self.parts)), None)

    def extended(self, queries: int, keys: int) -> "And":
        """Each part by itself."""
        return And(tuple(part.extended(queries, keys) for part in self.parts))

    def cut(self, rows: Span, columns: Span) -> "And":
        """Each part by itself."""
        return And(tuple(part.cut(rows, columns) for part in self.parts))


@structural
class Or(Mask):
    """The pairs that some part allows."""

    parts: tuple[Mask, ...]

    def predicate(self, rows: Span, columns: Span) -> Array:
        """The union."""
        return functools.reduce(operator.or_, (part.predicate(rows, columns) for part in self.parts))

    def mismatch(self, sizes: Sizes) -> str | None:
        """The first part that does not fit."""
        return next(filter(None, (part.mismatch(sizes) for part in self.parts)), None)

    def extended(self, queries: int, keys: int) -> "Or":
        """Each part by itself."""
        return Or(tuple(part.extended(queries, keys) for part in self.parts))

    def cut(self, rows: Span, columns: Span) -> "Or":
        """Each part by itself."""
        return Or(tuple(part.cut(rows, columns) for part in self.parts))


@structural
class Not(Mask):
    """The pairs that `part` does not allow."""

    part: Mask

    def predicate(self, rows: Span, columns: Span) -> Array:
        """The complement."""
        return ~self.part.predicate(rows, columns)

    def mismatch(self, sizes: Sizes) -> str | None:
        """That of the part."""
        return self.part.mismatch(sizes)

    def extended(self, queries: int, keys: int) -> "Not":
        """Of the part."""
        return Not(self.part.extended(queries, keys))

    def cut(self, rows: Span, columns: Span) -> "Not":
        """Of the part."""
        return Not(self.part.cut(rows, columns))


def describe(node: object) -> str:
    """The structure of a mask or bias in one line, e.g. `Causal & Segments`."""
    match node:
        case And(parts=parts):
            return " & ".join(f"({describe(p)})" if isinstance(p, Or) else describe(p) for p in parts)
        case Or(parts=parts):
            return " | ".join(describe(p) for p in parts)
        case Not(part=And() | Or() as part):
            return f"~({describe(part)})"
        case Not(part=part):
            return f"~{describe(part)}"
        case Window(left=left, right=right):
            return f"Window({left}, {right})"
        case _:
            return type(node).__name__


def per_batch(value: int | AnyArray) -> int | AnyArray:
    """A number, or one number a batch row brought to `[B, 1, 1, 1]`."""
    return value if isinstance(value, int) or jnp.ndim(value) == 0 else value[:, None, None, None]


def broadcast_mismatch(name: str, array: AnyArray, sizes: Sizes) -> str | None:
    """Why `array` does not broadcast to `[B, H, T, S]`, or None."""
    shape = jnp.shape(array)
    if len(shape) != 4 or any(have not in (1, want) for have, want in zip(shape, sizes)):
        return f"{name} has shape {list(shape)}; it must broadcast to [B, H, T, S] = {list(sizes)}"
    return None


def _vector_mismatch(name: str, value: int | AnyArray, batch: int, scalar: bool = False) -> str | None:
    shape = jnp.shape(value)
    if shape in ((batch,), (1,)) or (scalar and shape == ()):
        return None
    also = "a scalar or " if scalar else ""
    return f"{name} has shape {list(shape)}; it must be {also}[{batch}], one number a batch row"


def _parts(mask: Mask, kind: type) -> tuple[Mask, ...]:
    return mask.parts if isinstance(mask, kind) else (mask,)  # type: ignore[attr-defined]
