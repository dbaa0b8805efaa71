"""Which floating-point type parameters, arithmetic and outputs have."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from .. import InputError

FLOATING = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Precision:
    """Floating-point types by name: of stored parameters, of matrix products, of what the model returns.

    Normalisation statistics, softmax and losses are computed in float32 at least, whatever `compute` is
    (Micikevicius et al., "Mixed Precision Training", 2018).
    """

    param: str = "float32"
    compute: str = "float32"
    output: str = "float32"

    def __post_init__(self) -> None:
        for field in ("param", "compute", "output"):
            value = getattr(self, field)
            if value not in FLOATING:
                raise InputError(f"precision {field}={value!r} is not one of {', '.join(FLOATING)}")

    def require_available(self) -> None:
        """Raise `InputError` for float64 where JAX would silently compute in float32."""
        wide = "float64" in (self.param, self.compute, self.output)
        if wide and jax.dtypes.canonicalize_dtype("float64") != jnp.float64:
            raise InputError("precision float64 needs JAX_ENABLE_X64=1 in the environment; it is not set")


FP64 = Precision("float64", "float64", "float64")
FP32 = Precision()
BF16 = Precision(compute="bfloat16")
FP16 = Precision(compute="float16")

POLICIES = {"fp64": FP64, "fp32": FP32, "bf16": BF16, "fp16": FP16}


def policy(name: str) -> Precision:
    """The precision called `fp64`, `fp32`, `bf16` or `fp16`; the last two keep float32 master parameters."""
    if name not in POLICIES:
        raise InputError(f"precision {name!r} is unknown; valid: {', '.join(POLICIES)}")
    return POLICIES[name]


def statistics_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The type in which sums over `dtype` values are taken: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def promote_statistics(x: jax.Array) -> jax.Array:
    """`x` in the type in which its mean, variance or softmax is to be taken."""
    return x.astype(statistics_dtype(x.dtype))
