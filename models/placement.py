"""Where a model computes: constraints and `shard_map`s put into its calls, and no line of it changed.

    step = make_train_step(placed(loss, layout), optimizer)

What the compiler does well (splitting products by the shardings of parameters and batches) is left to it.
What it cannot do, kernels written by hand, or does badly, is said at the few calls where it is decided:
`flax.linen.intercept_methods` sees them, also under scan, remat, grad and jit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from .. import InputError
from ..parallel.layout import Layout
from ..parallel.rules import split_axes
from .attention import AttentionModule
from .block import Stacked
from .dispatch import ExpertAxes
from .experts import Experts
from .hooks import Hook
from .kernels import Bias, Joined, Mask, MeshAxes, sharded_attention
from .kernels.context import Method
from .pipeline import run_in_stages
from .zigzag_columns import ZigzagColumns

F = TypeVar("F", bound=Callable[..., Any])

STREAM = ("embedded", "middle", "residual")
"""Hooks that see the residual stream `[B, T, D]`."""
WRITERS = ("attention", "cross_attention", "mlp")
"""Modules that read the whole width of each token, and add to it what their heads or neurons sum to."""
READERS = (*WRITERS, "head")


def placed(function: F, layout: Layout, *, method: Method = "ring", sequence_parallel: bool = True) -> F:
    """`function`, which calls models under `jax.jit`, computing where `layout` says.

    * The core of every attention (`AttentionModule.compute`) is one `shard_map` over the axes of batch, heads
      and length, so kernels run on any mesh (`kernels.sharded_attention`); `method` is how keys reach queries
      over `context`. Deltas that intercept `attend` stay outside of it.
    * The residual stream is held where its rows lie (`Layout.activations`), and with `sequence_parallel`
      between sublayers also split along T over the devices that share heads: norms and what is kept for the
      backward pass are, and the sum of partial products is scattered where it was copied.
    * Routed experts (`Experts`) are one `shard_map`: each device computes its own (`models.dispatch`).
    * Scanned layers over `pipe` run in stages (`models.pipeline`).
    * In a layout in zigzag order positions and dropout are those of the natural order (`ZigzagColumns`).

    Linen models of ours have these sites; for others, and on one device, nothing changes. Inside a
    `shard_map` over some axes the others count. Raises InputError where lengths do not divide over `context`,
    and in zigzag order for what is no causal language model.
    """
    if layout.mesh.size == 1:
        return function
    axes = attention_axes(layout, method)
    spread = "heads" if sequence_parallel and axes.heads else None

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        in_zigzag = axes.length is not None and axes.order == "zigzag"
        columns = ZigzagColumns(layout.mesh.shape[axes.length]) if in_zigzag else None
        placement = Placement(layout, axes, spread, columns)
        with _known(layout.mesh), nn.intercept_methods(placement.intercept):
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


def expert_axes(layout: Layout) -> ExpertAxes:
    """Where rows, length, experts and their neurons lie by the layout's rules."""
    names = ("batch", "length", "experts", "mlp")
    return ExpertAxes(
        layout.mesh,
        *(split_axes(layout.rules.mesh_axes(name), layout.mesh, "experts") for name in names),
    )


def _held(layout: Layout, forward: str | None, backward: str | None) -> Callable[[jax.Array], jax.Array]:
    """The identity, with values and gradients each held in a place of their own.

    A constraint's gradient is held where its value is; here one is gathered and the other scattered: f and
    its conjugate in Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053, §3).
    """
    hold = jax.custom_vjp(lambda x: layout.activations(x, forward))
    hold.defvjp(
        lambda x: (layout.activations(x, forward), None),
        lambda _, gradient: (layout.activations(gradient, backward),),
    )
    return hold


def _known(mesh: Mesh) -> AbstractContextManager:
    """What is traced in it can ask for the mesh, `jax.sharding.get_abstract_mesh`, and its devices' platform.

    An enclosing `shard_map` has said already.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        return nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


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
        if self.layout.mesh.shape["pipe"] > 1:
            if isinstance(module, Stacked) and method == "stacked" and not module.is_initializing():
                _, x, context_of_layers = args
                return run_in_stages(module, x, context_of_layers, self.layout)
            if module.name == "layers_0":
                raise InputError("mesh axis pipe splits scanned layers; add scan=True (--scan), or use data")
        if method != "__call__":
            return call(*args, **kwargs)
        if isinstance(module, Experts):
            return call(*args, **kwargs, axes=expert_axes(self.layout))
        if self.columns is not None:
            call = self.columns.adapted(module, call)
        if isinstance(module, Hook):
            value = call(*args, **kwargs)
            return self.layout.activations(value, self.spread) if module.name in STREAM else value
        if self.spread is None or module.name not in (*READERS, "embedding"):
            return call(*args, **kwargs)
        if module.name == "embedding":  # looked up in a table that lies over the same devices
            return self.layout.activations(call(*args, **kwargs))
        if kwargs.get("memory") is not None:
            kwargs = {**kwargs, "memory": self.gathered(kwargs["memory"])}
        value = call(self.gathered(args[0]), *args[1:], **kwargs)
        return self.scattered(value) if module.name in WRITERS else value

    def gathered(self, x: jax.Array) -> jax.Array:
        """The stream as a sublayer reads it, whole along T; its gradient, a sum, is scattered."""
        return _held(self.layout, None, self.spread)(x)

    def scattered(self, x: jax.Array) -> jax.Array:
        """What a sublayer adds to the stream, split along T; its gradient is gathered."""
        return _held(self.layout, self.spread, None)(x)

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
