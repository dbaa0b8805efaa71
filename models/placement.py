"""Where a model computes: constraints and `shard_map`s put into its calls, and no line of it changed.

    step = make_train_step(placed(loss, layout), optimizer)

What the compiler does well (splitting products by the shardings of parameters and batches) is left to it.
What it cannot do, kernels written by hand, or does badly, is said at the few calls where it is decided:
`flax.linen.intercept_methods` sees them, also under scan, remat, grad and jit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import InputError
from ..parallel.layout import Layout
from ..parallel.rules import split_axes
from .attention import AttentionModule
from .hooks import Hook
from .kernels import Bias, Joined, Mask, MeshAxes, sharded_attention
from .kernels.context import Method
from .zigzag_columns import ZigzagColumns

F = TypeVar("F", bound=Callable[..., Any])

STREAM = ("embedded", "middle", "residual")
"""Hooks that see the residual stream `[B, T, D]`."""
SUBLAYERS = ("attention", "cross_attention", "mlp")
"""Modules that read and write it, each token's whole width at once."""


def placed(function: F, layout: Layout, *, method: Method = "ring", sequence_parallel: bool = True) -> F:
    """`function`, which calls models under `jax.jit`, computing where `layout` says.

    * The core of every attention (`AttentionModule.compute`) is one `shard_map` over the axes of batch, heads
      and length, so kernels run on any mesh (`kernels.sharded_attention`); `method` is how keys reach queries
      over `context`. Deltas that intercept `attend` stay outside of it.
    * The residual stream is held where its rows lie (`Layout.activations`), and with `sequence_parallel`
      between sublayers also split along T over the devices that share heads: norms and what is kept for the
      backward pass are, and the sum of partial products is scattered where it was copied.
    * In a layout in zigzag order positions and dropout are those of the natural order (`ZigzagColumns`).

    Linen models of ours have these sites; for others, and on one device, nothing changes. Inside a
    `shard_map` over some axes the others count. Raises InputError where lengths do not divide over `context`,
    and in zigzag order for what is no causal language model.
    """
    if layout.mesh.size == 1:
        return function
    axes, spread = attention_axes(layout, method), "heads" if sequence_parallel else None

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        columns = ZigzagColumns(layout.mesh.shape[axes.length]) if _in_zigzag(axes) else None
        with nn.intercept_methods(Placement(layout, axes, spread, columns).intercept):
            return function(*args, **kwargs)

    return cast(F, run)


def attention_axes(layout: Layout, method: Method = "ring") -> MeshAxes:
    """Where batch, heads and length of attention lie by the layout's rules."""
    batch, heads, length = (
        split_axes(layout.rules.mesh_axes(name), layout.mesh, "attention")
        for name in ("batch", "heads", "length")
    )
    if len(length) > 1:
        raise InputError(f"the rules split 'length' over {' and '.join(length)}; attention can over one axis")
    return MeshAxes(layout.mesh, batch, heads, length[0] if length else None, layout.order, method)


def _in_zigzag(axes: MeshAxes) -> bool:
    return axes.length is not None and axes.order == "zigzag"


@dataclass(frozen=True)
class Placement:
    """The interceptor of `placed`, for one trace: `columns` remembers how many a row has."""

    layout: Layout
    axes: MeshAxes
    spread: str | None
    columns: ZigzagColumns | None

    def intercept(self, call: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        """What the call returns, computed or held in its place."""
        module, method = context.module, context.method_name
        if isinstance(module, AttentionModule) and method == "compute":
            return self.compute(module, call, *args)
        if method != "__call__":
            return call(*args, **kwargs)
        if self.columns is not None:
            call = self.columns.adapted(module, call)
        if isinstance(module, Hook):
            value = call(*args, **kwargs)
            return self.layout.activations(value, self.spread) if module.name in STREAM else value
        if module.name in SUBLAYERS:
            return self.sublayer(call, args, kwargs)
        if module.name == "head":
            args = (self.layout.activations(args[0]), *args[1:])
        return call(*args, **kwargs)

    def sublayer(self, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Every token's heads or neurons lie over devices: tokens are brought together, results apart."""
        whole = self.layout.activations
        if kwargs.get("memory") is not None:
            kwargs = {**kwargs, "memory": whole(kwargs["memory"])}
        value = call(whole(args[0]), *args[1:], **kwargs)
        return whole(value, self.spread) if isinstance(value, jax.Array) else value

    def compute(
        self,
        module: AttentionModule,
        call: Callable[..., Any],
        query: jax.Array,
        key: Any,
        value: Any,
        mask: Mask,
        bias: Bias | None,
        return_lse: bool,
    ) -> Any:
        """Attention on the mesh; what a CPU's cache keeps as one axis stays with the compiler."""
        if isinstance(key, Joined):
            return call(query, key, value, mask, bias, return_lse)
        if self.columns is not None:
            self.columns.require(query.shape[1])
        choice = module.choice
        return sharded_attention(
            query,
            jnp.asarray(key),
            jnp.asarray(value),
            axes=self.axes,
            mask=mask,
            bias=bias,
            impl=choice.implementation,
            return_lse=return_lse,
            **choice.scores,
        )
