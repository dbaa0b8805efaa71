"""IA3: learned factors of keys, values and neurons (Liu et al., 2022, arXiv 2205.05638, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from ... import InputError
from .bottleneck import features_of, first_of, with_first
from .matrices import matrix_of
from .methods import Axes, Method, Site, SiteMethod, Variables, first_input

SIDES = ("output", "input")


@dataclass(frozen=True)
class IA3(SiteMethod):
    """`y * scale` on a module's output, or, where `on="input"`, the module at `x * scale`.

    The factors start at one, so the model starts exactly where it was. On the output the site's bias is
    scaled with it, as in PEFT (`tuners/ia3/layer.py`). Default positions are attention's key and value;
    `ia3_spec` adds the neurons. Where a module has no kernel, such as the hook `mlp/act`, its last axis is
    scaled; of several outputs the first is.
    """

    on: str = "output"

    name: ClassVar[str] = "ia3"
    positions: ClassVar[tuple[str, ...]] = ("attention/(key|value)",)
    neutral: ClassVar[float] = 1.0

    @property
    def axes(self) -> Axes:
        """Factors lie as what they scale."""
        return {"scale": ("out" if self.on == "output" else "in",)}

    def __post_init__(self) -> None:
        if self.on not in SIDES:
            raise InputError(f"IA3 on={self.on!r} is not one of {', '.join(SIDES)}")

    def init(self, rng: jax.Array, site: Site, args: tuple, output: Any) -> Variables:
        """`scale [out]` or `[in]`; raises `InputError` where there are no features to scale."""
        x, y = args[0], first_of(output)
        if "kernel" in site.params:
            matrix = matrix_of(site, x, y, "IA3")
            size = matrix.outputs if self.on == "output" else matrix.inputs
        else:
            size = features_of(site, y if self.on == "output" else x, "IA3", self.on)
        return {"scale": jnp.ones(size)}

    def apply(
        self, variables: Variables, site: Site, call: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        """The scaled output, or the output at the scaled input; each in its own dtype."""
        scale = variables["scale"]
        if self.on == "output":
            output = call(*args, **kwargs)
            y = first_of(output)
            return with_first(output, y * _spread(scale, y, _last_axes(scale, y)))
        x = first_input(args, kwargs)
        x = x * _spread(scale, x, _input_axes(scale, site.module, x))
        if args:
            return call(x, *args[1:], **kwargs)
        return call(**{**kwargs, next(iter(kwargs)): x})

    def merge(self, variables: Variables, params: Variables, path: str) -> Variables:
        """The kernel's columns and the bias scaled, or the kernel's rows; in single precision or better."""
        return self._times(variables["scale"], params, path)

    def unmerge(self, variables: Variables, params: Variables, path: str) -> Variables:
        """The division by the factors; raises `InputError` where one is zero and left nothing to divide."""
        scale = variables["scale"]
        if not isinstance(scale, jax.core.Tracer) and not scale.all():
            raise InputError(
                f"{path}: an IA3 factor is 0, so its merge cannot be undone; keep the parameters"
            )
        return self._times(1 / scale, params, path)

    def scaled(self, variables: Variables, factor: Any) -> Variables:
        """Factors as many times as far from one."""
        return {**variables, "scale": 1 + factor * (variables["scale"] - 1)}

    def _times(self, scale: jax.Array, params: Variables, path: str) -> Variables:
        if "kernel" not in params:
            raise InputError(f"{path}: IA3 cannot be merged into a module without a kernel; keep it attached")
        kernel, (*lead, size) = params["kernel"], scale.shape
        if self.on == "input":
            rows = kernel.reshape(*lead, size, -1) * scale[..., :, None]
            return {**params, "kernel": rows.reshape(kernel.shape).astype(kernel.dtype)}
        columns = kernel.reshape(*lead, -1, size) * scale[..., None, :]
        changed = {"kernel": columns.reshape(kernel.shape).astype(kernel.dtype)}
        if "bias" in params:
            bias = params["bias"]
            changed["bias"] = (bias * scale.reshape(bias.shape)).astype(bias.dtype)
        return {**params, **changed}


def ia3_spec(attention: str = "attention/(key|value)", mlp: str = "mlp/down") -> dict[str, Method]:
    """The paper's three places: keys and values, and the neurons that enter the feed-forward's last layer."""
    return {attention: IA3(), mlp: IA3(on="input")}


def _spread(scale: jax.Array, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The factors in the dtype of `x`, along those of its axes."""
    shape = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
    return scale.reshape(shape).astype(x.dtype)


def _last_axes(scale: jax.Array, x: jax.Array) -> tuple[int, ...]:
    """As many last axes of `x` as have a feature for each factor."""
    count = next(n for n in range(1, x.ndim + 1) if math.prod(x.shape[-n:]) == scale.size)
    return tuple(range(x.ndim - count, x.ndim))


def _input_axes(scale: jax.Array, module: nn.Module, x: jax.Array) -> tuple[int, ...]:
    """The axes of `x` that the module contracts, as `DenseGeneral` names them."""
    axis = getattr(module, "axis", None)
    if axis is None:
        return _last_axes(scale, x)
    return tuple(each % x.ndim for each in (axis if isinstance(axis, tuple) else (axis,)))
