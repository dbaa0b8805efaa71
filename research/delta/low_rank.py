"""What LoRA and its relatives share: thin matrices `a [in, rank]`, `b [rank, out]` beside a kernel."""

from __future__ import annotations

from math import isfinite
from typing import Any

import jax
import jax.numpy as jnp

from ... import InputError
from ...models.products import project
from .matrices import Matrix, matrix_of
from .methods import Site


def require_rank(method: str, rank: int) -> None:
    """Raise `InputError` for a rank that is no integer, or below 1."""
    if not isinstance(rank, int):
        raise InputError(f"{method} rank={rank!r} is a {type(rank).__name__}; it must be an integer")
    if rank < 1:
        raise InputError(f"{method} rank={rank} must be at least 1")


def require_alpha(method: str, alpha: float) -> None:
    """Raise `InputError` for a factor that is infinite or no number."""
    if not isfinite(alpha):
        raise InputError(f"{method} alpha={alpha} must be finite")


def require_dropout(method: str, dropout: float) -> None:
    """Raise `InputError` for a rate that is no share below 1."""
    if not 0.0 <= dropout < 1.0:
        raise InputError(f"{method} dropout={dropout} must be at least 0 and below 1")


def fitting_matrix(site: Site, x: Any, y: Any, method: str, rank: int) -> Matrix:
    """The site's matrix; raises `InputError` where it is none or the rank exceeds it."""
    matrix = matrix_of(site, x, y, method)
    require_fit(site.path, method, rank, matrix.inputs, matrix.outputs)
    return matrix


def require_fit(path: str, method: str, rank: int, inputs: int, outputs: int) -> None:
    """Raise `InputError` where the rank exceeds that of any matrix of this size."""
    if rank > min(inputs, outputs):
        raise InputError(
            f"{path}: {method} rank={rank} exceeds its {inputs}x{outputs} matrix; "
            f"at most {min(inputs, outputs)} is possible"
        )


def uniform(rng: jax.Array, inputs: int, rank: int) -> jax.Array:
    """`[in, rank]` uniform in ±1/sqrt(in), PyTorch's `kaiming_uniform(a=sqrt(5))`."""
    bound = inputs**-0.5
    return jax.random.uniform(rng, (inputs, rank), minval=-bound, maxval=bound)


def through(x: jax.Array, a: jax.Array, b: jax.Array, scale: float = 1.0) -> jax.Array:
    """`scale (x a) b` for `x [..., in]`, in the dtype of `x`; scaled where it is narrowest."""
    return project(project(x, a.astype(x.dtype)) * scale, b.astype(x.dtype))


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a b [..., in, out]` for weights: in full precision also where the device would round its factors."""
    return jnp.matmul(a, b, precision="highest")


def wide(kernel: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A kernel as `shape`, in single precision at least: sums in bfloat16 would lose small deltas."""
    return kernel.reshape(shape).astype(jnp.promote_types(kernel.dtype, jnp.float32))


def drop(rng: jax.Array, x: jax.Array, rate: float) -> jax.Array:
    """Inverted dropout."""
    keep = jax.random.bernoulli(rng, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def dropped(x: jax.Array, site: Site, rate: float, seed: jax.Array | None) -> jax.Array:
    """`x` with dropout where the call trains; `seed`, one a layer, sets the masks of scanned layers apart."""
    if not rate or not site.train:
        return x
    assert site.rng is not None and seed is not None
    return drop(jax.random.fold_in(site.rng, seed), x, rate)


def dropout_seed(rng: jax.Array) -> dict[str, jax.Array]:
    """The state that `dropped` needs."""
    return {"seed": jax.random.bits(rng, dtype=jnp.uint32)}
