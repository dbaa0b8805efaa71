"""LoRA: a low-rank product beside a weight matrix (Hu et al., 2022, arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ... import InputError
from .matrices import Matrix, matrix_of
from .methods import Site, SiteMethod, Variables, first_input


@dataclass(frozen=True)
class LoRA(SiteMethod):
    """`y + (alpha / rank) (dropout(x) A) B` at a module with a kernel, A `[in, rank]`, B `[rank, out]`.

    A starts uniform in ±1/sqrt(in), which is PyTorch's `kaiming_uniform(a=sqrt(5))` as PEFT uses it; B at
    zero, so the model starts exactly where it was. Works at Dense and DenseGeneral (axes flattened).
    Default positions: attention's query and value, as in the paper. Computed in the site's own dtype.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0

    name: ClassVar[str] = "lora"
    positions: ClassVar[tuple[str, ...]] = ("attention/(query|value)",)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"LoRA rank={self.rank} must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"LoRA dropout={self.dropout} must be at least 0 and below 1")

    @property
    def random(self) -> bool:
        """Dropout draws."""
        return self.dropout > 0

    @property
    def scale(self) -> float:
        """Factor of the product."""
        return self.alpha / self.rank

    def init(self, rng: jax.Array, site: Site, args: tuple, output: Any) -> Variables:
        """A and B; raises `InputError` where the site is no matrix or the rank exceeds it."""
        matrix = self._matrix(site, args[0], output)
        if self.rank > min(matrix.inputs, matrix.outputs):
            raise InputError(
                f"{site.path}: LoRA rank={self.rank} exceeds its {matrix.inputs}x{matrix.outputs} matrix; "
                f"at most {min(matrix.inputs, matrix.outputs)} is possible"
            )
        bound = matrix.inputs**-0.5
        a = jax.random.uniform(rng, (matrix.inputs, self.rank), minval=-bound, maxval=bound)
        return {"a": a, "b": jnp.zeros((self.rank, matrix.outputs))}

    def state(self, rng: jax.Array, site: Site, args: tuple, output: Any, trained: Variables) -> Variables:
        """With dropout, a number that sets this layer's masks apart, also inside a scan."""
        return {"seed": jax.random.bits(rng, dtype=jnp.uint32)} if self.random else {}

    def apply(
        self, variables: Variables, site: Site, call: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        """The site's output plus the product."""
        y, x = call(*args, **kwargs), first_input(args, kwargs)
        x = self._matrix(site, x, y).flatten(x).astype(y.dtype)
        if self.random and site.train:
            assert site.rng is not None
            x = _drop(jax.random.fold_in(site.rng, variables["seed"]), x, self.dropout)
        product = (x @ variables["a"].astype(y.dtype)) @ variables["b"].astype(y.dtype)
        return y + (product * self.scale).reshape(y.shape)

    def merge(self, variables: Variables, params: Variables, path: str) -> Variables:
        """The kernel plus the scaled product, summed in single precision or better."""
        kernel = params["kernel"]
        product = (variables["a"] @ variables["b"]) * self.scale
        return {**params, "kernel": (kernel + product.reshape(kernel.shape)).astype(kernel.dtype)}

    def _matrix(self, site: Site, x: Any, y: Any) -> Matrix:
        return matrix_of(site, x, y, "LoRA")


def _drop(rng: jax.Array, x: jax.Array, rate: float) -> jax.Array:
    keep = jax.random.bernoulli(rng, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))
