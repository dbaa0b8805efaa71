"""Masks that go by a property of one side: which keys may be seen at all, which queries may look.

With `&`, `|` and `~` they write rules such as CPM's, `Keys(context) | (Queries(~context) & Causal())`: what
is given is seen by all, what is to be predicted only by later tokens that are to be predicted too.
"""

import jax.numpy as jnp
from jax import Array

from .masks import Mask, Sizes
from .spans import Span, pad
from .trees import AnyArray, structural


@structural
class Keys(Mask):
    """Every query sees the keys that are flagged: bool `[B, S]`, or `[1, S]` for all batch rows."""

    flags: AnyArray

    def predicate(self, rows: Span, columns: Span) -> Array:
        """The flagged columns, `[B or 1, 1, 1, s]`."""
        return columns.cut(self.flags, 1)[:, None, None, :]

    def mismatch(self, sizes: Sizes) -> str | None:
        """A flag for every key."""
        return _flags_mismatch("Keys.flags", self.flags, sizes.batch, sizes.keys)

    def extended(self, queries: int, keys: int) -> "Keys":
        """Nothing more is flagged."""
        return Keys(pad(self.flags, 1, keys))

    def cut(self, rows: Span, columns: Span) -> "Keys":
        """The flags of the columns."""
        return Keys(columns.cut(self.flags, 1))


@structural
class Queries(Mask):
    """The queries that are flagged, bool `[B, T]` or `[1, T]`, see every key; the others see none."""

    flags: AnyArray

    def predicate(self, rows: Span, columns: Span) -> Array:
        """The flagged rows, `[B or 1, 1, t, 1]`."""
        return rows.cut(self.flags, 1)[:, None, :, None]

    def mismatch(self, sizes: Sizes) -> str | None:
        """A flag for every query."""
        return _flags_mismatch("Queries.flags", self.flags, sizes.batch, sizes.queries)

    def extended(self, queries: int, keys: int) -> "Queries":
        """Nothing more is flagged."""
        return Queries(pad(self.flags, 1, queries))

    def cut(self, rows: Span, columns: Span) -> "Queries":
        """The flags of the rows."""
        return Queries(rows.cut(self.flags, 1))


def _flags_mismatch(name: str, flags: AnyArray, batch: int, length: int) -> str | None:
    shape = jnp.shape(flags)
    if flags.dtype != jnp.bool_:
        return f"{name} has type {flags.dtype}; it must be bool"
    if shape not in ((batch, length), (1, length)):
        return f"{name} has shape {list(shape)}; it must be [{batch}, {length}]"
    return None
