"""What one call of `attention` asks for, and what an implementation must offer."""

import dataclasses
from typing import Any, Protocol, TypeVar

import jax
from jax import Array

from .biases import Bias
from .masks import Mask, describe
from .terms import Terms

PARTITIONED = (
    "XLA cannot partition a kernel written by hand; call it inside shard_map, or by name on one device"
)

T = TypeVar("T", Mask, Bias | None)


@dataclasses.dataclass(frozen=True)
class Request:
    """Everything about one call of `attention` but the numbers; hashable, known at trace time.

    `mask` and `bias` hold shapes in the place of arrays, so an implementation sees their structure. `lse` is
    whether the log-sum-exp, and its gradient, is asked for; `dropout` is the rate, 0 without; `page` is how
    many keys a page of a cache holds, 0 where keys are no cache in pages. `partitioned`: XLA may split the
    call over several devices, because there are some and it is not inside a `shard_map` over all mesh axes.
    """

    platform: str
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    width: int
    value_width: int
    dtype: str
    mask: Mask
    bias: Bias | None
    soft_cap: bool
    sinks: bool = False
    dropout: float = 0.0
    lse: bool = False
    page: int = 0
    partitioned: bool = False

    def __str__(self) -> str:
        extras = [describe(self.mask)]
        extras += [f"bias {describe(self.bias)}"] if self.bias is not None else []
        extras += ["soft cap"] if self.soft_cap else []
        extras += ["sinks"] if self.sinks else []
        extras += [f"dropout {self.dropout:g}"] if self.dropout else []
        extras += ["lse"] if self.lse else []
        extras += [f"pages of {self.page}"] if self.page else []
        shape = (
            f"B={self.batch} T={self.queries} S={self.keys} H={self.heads} G={self.kv_heads} K={self.width}"
        )
        return f"{shape} {self.dtype} on {self.platform}, {', '.join(extras)}"


class Implementation(Protocol):
    """One way to compute attention."""

    @property
    def name(self) -> str:
        """What `impl=` calls it."""

    def supports(self, request: Request) -> str | None:
        """None, or the reason why it cannot compute the request."""

    def unfit(self, request: Request) -> str | None:
        """None, or the reason to look for another one, as long as this one is not asked for by name."""

    def __call__(self, q: Array, k: Array, v: Array, terms: Terms) -> tuple[Array, Array]:
        """Output `[B, T, H, K]` in the type of q and log-sum-exp `[B, H, T]`, both differentiable.

        The log-sum-exp is at least float32, includes the sinks and knows nothing of dropout.
        """


def abstract(tree: T) -> T:
    """The same expression with shapes and types in the place of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jax.numpy.shape(x), jax.numpy.result_type(x)), tree)


def request_of(q: Array, k: Any, v: Any, terms: Terms, lse: bool) -> Request:
    """The description of the call by which an implementation is chosen; of k and v only shapes are read."""
    batch, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    return Request(
        platform=platform(),
        batch=batch,
        queries=queries,
        keys=keys,
        heads=heads,
        kv_heads=kv_heads,
        width=width,
        value_width=v.shape[3],
        dtype=q.dtype.name,
        mask=abstract(terms.mask),
        bias=abstract(terms.bias),
        soft_cap=terms.soft_cap is not None,
        sinks=terms.sinks is not None,
        dropout=0.0 if terms.dropout is None else terms.dropout.rate,
        lse=lse,
        partitioned=partitioned(),
    )


def platform() -> str:
    """Of the mesh around, inside `shard_map`: perhaps one that is only compiled for; else the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def partitioned() -> bool:
    """Whether XLA may split what is being traced over several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() > 1 and (mesh.empty or not mesh.are_all_axes_manual)
