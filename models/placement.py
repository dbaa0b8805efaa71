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

F = TypeVar("F", bound=Callable[..., Any])


def placed(function: F, layout: Layout, *, method: Method = "ring") -> F:
    """`function`, which calls models under `jax.jit`, computing where `layout` says.

    * The core of every attention (`AttentionModule.compute`) is one `shard_map` over the axes of batch, heads
      and length, so kernels run on any mesh (`kernels.sharded_attention`); `method` is how keys reach queries
      over `context`. Deltas that intercept `attend` stay outside of it.
    * The embedded tokens (hook `embedded`) are held where their rows lie, see `Layout.activations`.

    Linen models of ours have these sites; for others, and on one device, nothing changes. Inside a
    `shard_map` over some axes the others count. Raises InputError where lengths do not divide over `context`.
    """
    if layout.mesh.size == 1:
        return function
    placement = Placement(layout, attention_axes(layout, method))

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(placement.intercept):
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
    return MeshAxes(layout.mesh, batch, heads, length[0] if length else None, method=method)


@dataclass(frozen=True)
class Placement:
    """The interceptor of `placed`."""

    layout: Layout
    axes: MeshAxes

    def intercept(self, call: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        """What the call returns, computed or held in its place."""
        module = context.module
        if isinstance(module, AttentionModule) and context.method_name == "compute":
            return self.compute(module, call, *args, **kwargs)
        value = call(*args, **kwargs)
        if isinstance(module, Hook) and module.name == "embedded":
            return self.layout.activations(value)
        return value

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
