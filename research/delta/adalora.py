"""AdaLoRA: low-rank products that share a budget of ranks (Zhang et al., 2023, arXiv 2303.10512)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ... import InputError
from .added_product import AddedProduct
from .low_rank import (
    dropout_seed,
    dropped,
    fitting_matrix,
    product,
    require_alpha,
    require_dropout,
    require_rank,
    through,
)
from .matrices import matrix_of
from .methods import Axes, Site, Variables, first_input


@dataclass(frozen=True)
class AdaLoRA(AddedProduct):
    """`y + s (dropout(x) A diag(e)) B`, a singular value decomposition in the making; `s = alpha / rank`.

    A `[in, rank]` and B `[rank, out]` are drawn from N(0, 0.02²), e `[rank]` is zero, so the model starts
    where it was. `rank` is every site's at the start, 12 as in PEFT; `training.rank_allocation` then sets the
    least important `e` of all sites to zero until as many are left as the budget has.

    `orthogonality` weighs `|AᵀA - I| + |BBᵀ - I|` (Frobenius norms) in the loss, summed over sites. The
    authors' code and PEFT average over all A and B instead: their 0.5 is 0.5 / (2 sites) here, and the
    default theirs for 25 sites. Default positions: every matrix of attention and of the feed-forward layer,
    as in the paper. Works at Dense and DenseGeneral (axes flattened).
    """

    rank: int = 12
    alpha: float = 16.0
    dropout: float = 0.0
    orthogonality: float = 0.01

    name: ClassVar[str] = "adalora"
    positions: ClassVar[tuple[str, ...]] = ("attention/(query|key|value|output)", "mlp/(up|gate|down)")
    axes: ClassVar[Axes] = {"a": ("in", None), "b": (None, "out")}

    def __post_init__(self) -> None:
        require_rank("AdaLoRA", self.rank)
        require_alpha("AdaLoRA", self.alpha)
        require_dropout("AdaLoRA", self.dropout)
        if self.orthogonality < 0:
            raise InputError(f"AdaLoRA orthogonality={self.orthogonality} must be at least 0")

    @property
    def scale(self) -> float:
        """Factor of the product; the small number is PEFT's, whose adapters compute the same here."""
        return self.alpha / (self.rank + 1e-5)

    def init(self, rng: jax.Array, site: Site, args: tuple, output: Any) -> Variables:
        """A, e and B; raises `InputError` where the site is no matrix of such a rank."""
        matrix = fitting_matrix(site, args[0], output, "AdaLoRA", self.rank)
        first, second = jax.random.split(rng)
        return {
            "a": 0.02 * jax.random.normal(first, (matrix.inputs, self.rank)),
            "e": jnp.zeros(self.rank),
            "b": 0.02 * jax.random.normal(second, (self.rank, matrix.outputs)),
        }

    def state(self, rng: jax.Array, site: Site, args: tuple, output: Any, trained: Variables) -> Variables:
        """With dropout, a number that sets this layer's masks apart, also inside a scan."""
        return dropout_seed(rng) if self.random else {}

    def apply(
        self, variables: Variables, site: Site, call: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        """The site's output plus the product."""
        y, x = call(*args, **kwargs), first_input(args, kwargs)
        x = matrix_of(site, x, y, "AdaLoRA").flatten(x).astype(y.dtype)
        x = dropped(x, site, self.dropout, variables.get("seed"))
        added = through(x, variables["a"] * variables["e"], variables["b"], self.scale)
        return y + added.reshape(y.shape)

    def scaled(self, variables: Variables, factor: Any) -> Variables:
        """The singular values times the factor."""
        return {**variables, "e": variables["e"] * factor}

    def penalty(self, variables: Variables) -> Any:
        """How far A's columns and B's rows are from orthonormal."""
        a, b = variables["a"], variables["b"]
        across = product(jnp.swapaxes(a, -1, -2), a), product(b, jnp.swapaxes(b, -1, -2))
        return self.orthogonality * sum(_distance(gram).sum() for gram in across)

    def change(self, variables: Variables) -> jax.Array:
        """What is added to the kernel, `[..., in, out]`."""
        return product(variables["a"] * variables["e"][..., None, :], variables["b"]) * self.scale


def _distance(gram: jax.Array) -> jax.Array:
    """The Frobenius norm of `gram - I`, with a gradient of 0 where it is 0."""
    square = jnp.square(gram - jnp.eye(gram.shape[-1], dtype=gram.dtype)).sum((-2, -1))
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
