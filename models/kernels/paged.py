"""Attention of a few queries on a cache that lies in pages: rows of any length share one pool of memory.

Kwon et al. 2023, "Efficient memory management for large language model serving with PagedAttention". What
computes it is chosen as `registry` chooses: kernels that read the pages where they lie register in
`DECODERS` before `Gathered`, which copies them together and does on every platform.
"""

import dataclasses
import functools
from typing import Protocol

import jax.numpy as jnp
from jax import Array

from ... import InputError
from .hopper.decoding import HopperPages
from .masks import Lengths
from .reference import Reference
from .registry import pick
from .request import Request
from .terms import Terms
from .tpu.decoding import Pages
from .trees import AnyArray, structural


@structural
class Paged:
    """Keys or values of a batch: position s of row b is `pages[table[b, s // page], s % page]`.

    `pages` is `[N, page, G, K]`, `table` int32 `[B, P]`; rows may share pages. Entries of the table beyond a
    row's length may be anything, and so may what the pages hold there.
    """

    pages: AnyArray
    table: AnyArray

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`[B, P · page, G, K]`: what the pages of a row have room for."""
        _, page, groups, width = self.pages.shape
        return self.table.shape[0], self.table.shape[1] * page, groups, width

    def gathered(self) -> Array:
        """The pages of each row one after the other, `[B, P · page, G, K]`."""
        return jnp.take(self.pages, self.table, axis=0, mode="clip").reshape(self.shape)

    def mismatch(self, name: str) -> str | None:
        """Why the arrays are not of the form they must have, or None."""
        if self.pages.ndim != 4:
            return f"{name}.pages has shape {list(self.pages.shape)}; it must be [N, page, G, K]"
        if self.table.ndim != 2 or not jnp.issubdtype(self.table.dtype, jnp.integer):
            found = f"{self.table.dtype}{list(self.table.shape)}"
            return f"{name}.table is {found}; it must be int32 [B, P], a page's number for each"
        return None


class Decoder(Protocol):
    """One way to compute attention on pages; `supports` and `unfit` as `request.Implementation` has them."""

    @property
    def name(self) -> str:
        """What `impl=` calls it."""

    def supports(self, request: Request) -> str | None:
        """None, or the reason why it cannot compute the request, whose `page` is the size of a page."""

    def unfit(self, request: Request) -> str | None:
        """None, or the reason to look for another one."""

    def __call__(self, q: Array, k: Paged, v: Paged, lengths: Array, terms: Terms) -> tuple[Array, Array]:
        """Output `[B, T, H, K]` and log-sum-exp `[B, H, T]`; row b has `lengths[b]` keys, its mask aside."""


@dataclasses.dataclass(frozen=True)
class Gathered:
    """XLA on any platform: a copy of each row's pages, then the plain softmax."""

    name: str = "gathered"

    def supports(self, request: Request) -> str | None:
        """It can do every request."""
        return None

    def unfit(self, request: Request) -> str | None:
        """It is where every choice ends."""
        return None

    def __call__(self, q: Array, k: Paged, v: Paged, lengths: Array, terms: Terms) -> tuple[Array, Array]:
        """Output and log-sum-exp; beyond a row's length all is zeroed: 0 times no number is no number."""
        filled = (jnp.arange(k.shape[1]) < lengths[:, None])[:, :, None, None]
        keys, values = (jnp.where(filled, each.gathered(), 0) for each in (k, v))
        return Reference()(q, keys, values, dataclasses.replace(terms, mask=terms.mask & Lengths(lengths)))


DECODERS: tuple[Decoder, ...] = (Pages(), HopperPages(), Gathered())


@functools.lru_cache(maxsize=1024)
def choose_decoder(request: Request, impl: str) -> Decoder:
    """As `registry.choose`, among those that read pages."""
    return pick(DECODERS, request, impl)


def check_pages(q: Array, k: Paged, v: Paged, lengths: Array | None) -> Array:
    """The lengths; raises InputError where there are none or the arrays of the call do not fit each other."""
    if lengths is None:
        raise InputError("decode_attention needs lengths [B] on paged keys and values")
    reasons = [k.mismatch("k"), v.mismatch("v")]
    if not any(reasons):
        batch, _, heads, width = q.shape
        if k.shape[0] != batch or k.shape[3] != width or heads % k.shape[2]:
            reasons.append(
                f"q {list(q.shape)} and keys {list(k.shape)} must be [B, T, H, K] and [B, S, G, K]"
            )
        if k.shape[:3] != v.shape[:3]:
            reasons.append(f"k {list(k.shape)} and v {list(v.shape)} must agree but for the last axis")
        if k.pages.shape[1] != v.pages.shape[1]:
            sizes = k.pages.shape[1], v.pages.shape[1]
            reasons.append(f"pages of {sizes[0]} keys and of {sizes[1]} values must agree")
        if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
            found = f"{lengths.dtype}{list(lengths.shape)}"
            reasons.append(f"lengths are {found}; they must be int32 [{batch}], how many keys a row has")
    if reason := next(filter(None, reasons), None):
        raise InputError(f"decode_attention: {reason}")
    return lengths
