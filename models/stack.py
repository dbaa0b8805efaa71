"""A stack of layers, unrolled or scanned, each computing again in the backward pass what its policy says."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from .. import InputError
from .block import Block, Context, Stacked
from .config import TransformerConfig
from .remat import INPUT, KEPT, ROWS

Body = Callable[..., tuple[jax.Array, None]]
DEAR = ("dot_general", "ragged_dot_general", "pallas_call", "top_k", "sort")  # primitives of jax


class Period(Stacked):
    """The layers of one period of the pattern, as the body of a scan."""

    config: TransformerConfig
    cross: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> tuple[jax.Array, None]:
        for index in range(self.config.period):
            x, _ = Block(self.config, index, self.cross, name=f"layer_{index}")(x, context)
        return x, None


def apply_layers(
    config: TransformerConfig,
    x: jax.Array,
    context: Context,
    cross: bool = False,
    read: jax.Array | None = None,
) -> jax.Array:
    """Run the stack inside the calling module's compact method.

    Unrolled, the layers are its children `layers_0`, `layers_1`, ...; scanned, they are one child
    `layers` whose parameters have a leading axis over layers (over periods, with the layers of a period
    called `layer_0`, ..., where the configuration has a pattern). `read [B]`: of the unrolled stack's output
    only these tokens are needed, `[B, 1, D]`.
    """
    layers = config.depth_of_decoder if cross else config.layers
    if config.scan:
        return _scanned(config, x, context, cross, layers // config.period)
    runs = config.remat_runs
    policies = [policy for policy, count in runs for _ in range(count if len(runs) > 1 else layers)]
    for index, policy in enumerate(policies):
        block = Block(config, index % config.period, cross, name=f"layers_{index}")
        needed = read if index == layers - 1 else None
        x, _ = remat_body(call_layer, policy, True)(block, x, context, needed)
    return x


def _scanned(config: TransformerConfig, x: jax.Array, context: Context, cross: bool, rows: int) -> jax.Array:
    """Layers as rows of stacked parameters, of which a scan's step takes one, or one of each policy's share.

    Several only where nothing is written: what a step sows has one row. Raises InputError where training
    would need both; without a backward pass the policy does not matter.
    """
    whole = (Block if config.period == 1 else Period)(config, cross=cross, name="layers")
    return whole.stacked(partial(_run_rows, rows), x, context)


def _run_rows(rows: int, whole: Any, x: jax.Array, context: Context) -> jax.Array:
    config, runs = whole.config, whole.config.remat_runs
    several = len(runs) > 1 and context.train and not whole.is_initializing()
    if several and (config.dropout or _writes(whole)):
        what = "dropout" if config.dropout else "routed experts, or of which values are read,"
        raise InputError(f"remat={config.remat!r}: scanned layers with {what} take one policy for all")
    if len(runs) == 1 or _writes(whole):
        return _scan(remat_body(call_layer, runs[0][0], False), rows)(whole, x, context)[0]
    unit = math.gcd(*(count for _, count in runs))
    policies = [policy for policy, count in runs for _ in range(count // max(unit, config.period))]

    def step(layers: nn.Module, x: jax.Array, context: Context) -> tuple[jax.Array, None]:
        for place, policy in enumerate(policies):
            own = nn.map_variables(call_layer, True, _row(place))
            x, _ = remat_body(own, policy, False, rows=True)(layers, x, context)
        return x, None

    scan = _scan(step, rows // len(policies))
    return nn.map_variables(scan, True, _grouped(rows, len(policies)))(whole, x, context)[0]


def call_layer(layer: nn.Module, x: jax.Array, *given: Any) -> tuple[jax.Array, None]:
    """The layer's own call, as a function: what a stack lifts over parameters."""
    return layer(x, *given)


def _scan(body: Any, rows: int) -> Any:
    return nn.scan(
        body,
        variable_axes={True: 0},  # parameters, the cache, and whatever hooks sow
        split_rngs={True: True},
        in_axes=nn.broadcast,
        length=rows,
    )


def _writes(module: nn.Module) -> bool:
    """Whether any collection may change: at initialisation, with a cache, or where something is sown."""
    scope = module.scope
    return scope is None or bool(scope.mutable)


def _grouped(rows: int, size: int) -> Callable[[Any], Any]:
    """Stacked variables `[L, ...]` as `[L / size, size, ...]`."""

    def group(leaf: jax.Array) -> jax.Array:
        if leaf.shape[:1] != (rows,):
            raise InputError(
                f"an array of shape {leaf.shape} has no row for each of {rows} scanned layers; "
                f"where some layers are tuned, remat takes one policy for all"
            )
        return leaf.reshape(rows // size, size, *leaf.shape[1:])

    return lambda tree: jax.tree.map(group, tree)


def _row(place: int) -> Callable[[Any], Any]:
    """One of the rows that a step has."""
    return lambda tree: jax.tree.map(lambda leaf: lax.index_in_dim(leaf, place, keepdims=False), tree)


def remat_body(body: Body, policy: str, prevent_cse: bool, rows: bool = False) -> Body:
    """A function of a module whose backward pass follows the policy.

    Of a body that takes its parameters from `rows` "none" keeps what products and kernels give and the values
    `ROWS`, and computes again what is elementwise. To keep everything would keep each row's parameters in
    the type of the products, and all the float32 values inside norms and activations, which keep only their
    input where no rule of the layer's overrides theirs.
    """
    rules = jax.checkpoint_policies
    if policy == "none" and not rows:
        return body
    if policy == "none":
        rule = rules.save_from_both_policies(_products, rules.save_only_these_names(*ROWS))
        return nn.remat(_naming(body, ROWS), policy=rule, prevent_cse=prevent_cse)
    if policy == "dots":
        return nn.remat(body, policy=rules.dots_saveable, prevent_cse=prevent_cse)
    rule = rules.save_only_these_names(*KEPT[policy]) if KEPT[policy] else None
    if policy == "offload":
        rule = rules.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    names = (INPUT,) if policy == "offload" else KEPT[policy]
    return nn.remat(_naming(body, names), policy=rule, prevent_cse=prevent_cse)


def _products(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether a value is dear to compute again: a product, a kernel's or an order's."""
    return primitive.name in DEAR


def _naming(body: Body, names: tuple[str, ...]) -> Body:
    """The same, giving what its policy is about the names by which it knows it."""

    def name_output(call: Callable, args: tuple, kwargs: dict, where: Any) -> Any:
        value = call(*args, **kwargs)
        known = where.method_name == "__call__" and where.module.name in names
        return checkpoint_name(value, where.module.name) if known else value

    def run(layer: nn.Module, x: jax.Array, *given: Any) -> tuple[jax.Array, None]:
        if INPUT in names:
            x = checkpoint_name(x, INPUT)
        if not set(names) - {INPUT}:
            return body(layer, x, *given)
        with nn.intercept_methods(name_output):
            return body(layer, x, *given)

    return run
