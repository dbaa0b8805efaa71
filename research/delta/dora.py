"""DoRA: a weight's magnitude and direction are tuned apart (Liu et al., 2024, arXiv 2402.09353)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from .low_rank import (
    dropout_seed,
    dropped,
    fitting_matrix,
    product,
    require_alpha,
    require_dropout,
    require_rank,
    through,
    uniform,
    wide,
)
from .matrices import matrix_of
from .methods import Axes, Site, SiteMethod, Variables, first_input


@dataclass(frozen=True)
class DoRA(SiteMethod):
    """`x (m V / |V|) + bias` with `V = W + s A B`, `|V|` its norm over the input for each output, `m [out]`.

    `m` starts at `|W|` and B at zero, so the model starts where it was; A and `s` are LoRA's. `|V|` follows
    A and B but is a constant to the gradient (section 4.3 of the paper). A magnitude of exactly 0 stands for
    `|V|` itself. Dropout acts on all of the input where training, as in the authors' code and PEFT. Works at
    Dense and DenseGeneral (axes flattened). Default positions: attention's query and value, as LoRA's.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rank_stabilised: bool = False

    name: ClassVar[str] = "dora"
    positions: ClassVar[tuple[str, ...]] = ("attention/(query|value)",)
    innermost: ClassVar[bool] = True
    axes: ClassVar[Axes] = {"a": ("in", None), "b": (None, "out"), "magnitude": ("out",)}

    def __post_init__(self) -> None:
        require_rank("DoRA", self.rank)
        require_alpha("DoRA", self.alpha)
        require_dropout("DoRA", self.dropout)

    @property
    def random(self) -> bool:
        """Dropout draws."""
        return self.dropout > 0

    @property
    def reads(self) -> bool:
        """Magnitudes start at the kernel's."""
        return True

    @property
    def scale(self) -> float:
        """Factor of the product."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)

    def init(self, rng: jax.Array, site: Site, args: tuple, output: Any) -> Variables:
        """A, B and the magnitudes; raises `InputError` where the site is no matrix of such a rank."""
        matrix = fitting_matrix(site, args[0], output, "DoRA", self.rank)
        a, b = uniform(rng, matrix.inputs, self.rank), jnp.zeros((self.rank, matrix.outputs))
        kernel = wide(site.params["kernel"], (matrix.inputs, matrix.outputs))
        return {"a": a, "b": b, "magnitude": self.norm(kernel, a, b)}

    def state(self, rng: jax.Array, site: Site, args: tuple, output: Any, trained: Variables) -> Variables:
        """With dropout, a number that sets this layer's masks apart, also inside a scan."""
        return dropout_seed(rng) if self.random else {}

    def apply(
        self, variables: Variables, site: Site, call: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        """The site's output, its product turned and stretched; the bias stays what it is."""
        y, x = call(*args, **kwargs), first_input(args, kwargs)
        matrix = matrix_of(site, x, y, "DoRA")
        x = matrix.flatten(x).astype(y.dtype)
        kernel = wide(site.params["kernel"], (matrix.inputs, matrix.outputs))
        seen = dropped(x, site, self.dropout, variables.get("seed"))
        if seen is not x:
            base = seen @ kernel.astype(y.dtype)
        elif site.params.get("bias") is not None:
            base = y.reshape(*x.shape[:-1], -1) - site.params["bias"].reshape(-1).astype(y.dtype)
        else:
            base = y.reshape(*x.shape[:-1], -1)
        gain = self._gain(variables, kernel)
        added = through(seen, variables["a"], variables["b"], self.scale)
        change = (gain - 1.0).astype(y.dtype) * base + gain.astype(y.dtype) * added
        return y + change.reshape(y.shape)

    def merge(self, variables: Variables, params: Variables, path: str) -> Variables:
        """The kernel with the direction and the magnitudes of the delta."""
        kernel, a, b = params["kernel"], variables["a"], variables["b"]
        matrix = wide(kernel, (*a.shape[:-1], b.shape[-1]))
        turned = matrix + product(a, b) * self.scale
        merged = self._gain(variables, matrix)[..., None, :] * turned
        return {**params, "kernel": merged.reshape(kernel.shape).astype(kernel.dtype)}

    def norm(self, kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        """`|W + s A B| [..., out]` over the inputs of a kernel `[..., in, out]`.

        Expanded, `|W|² + 2 s W·AB + s² |AB|²`, so that nothing of the kernel's size is made.
        """
        mixed = product(jnp.swapaxes(a, -1, -2), kernel)
        inner = product(product(jnp.swapaxes(a, -1, -2), a), b)
        square = jnp.square(kernel).sum(-2) + (b * (2 * self.scale * mixed + self.scale**2 * inner)).sum(-2)
        return jnp.sqrt(jnp.maximum(square, 0.0))

    def _gain(self, variables: Variables, kernel: jax.Array) -> jax.Array:
        """`m / |V|`, 1 where the magnitude is 0 and where `|V|` is."""
        norm = jax.lax.stop_gradient(self.norm(kernel, variables["a"], variables["b"]))
        magnitude = jnp.where(variables["magnitude"] == 0, norm, variables["magnitude"])
        return jnp.where(norm == 0, 1.0, magnitude / jnp.where(norm == 0, 1.0, norm))
