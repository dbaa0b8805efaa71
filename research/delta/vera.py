"""VeRA: two trained vectors around random matrices (Kopiczko et al., 2024, arXiv 2310.11454)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ...models.products import project
from .added_product import AddedProduct
from .low_rank import dropout_seed, dropped, product, require_dropout, require_rank
from .matrices import matrix_of
from .methods import Axes, Site, Variables, first_input


@dataclass(frozen=True)
class VeRA(AddedProduct):
    """`y + ((dropout(x) A) * d B) * b` with trained `lambda_d = d [rank]` and `lambda_b = b [out]`.

    A `[in, rank]` and B `[rank, out]` are state: drawn once from `seed`, uniform in ±sqrt(6/in) and
    ±sqrt(6/rank) (He et al., 2015), the same for all sites of one shape, and never trained. b starts at
    zero, so the model starts where it was, d at `initial`, 0.1 as in PEFT. The rank may exceed the
    matrix's, as in the paper (1024 on matrices of 768); 256 is PEFT's. Default positions: attention's query
    and value, as in the paper. Works at Dense and DenseGeneral (axes flattened).
    """

    rank: int = 256
    dropout: float = 0.0
    initial: float = 0.1
    seed: int = 0

    name: ClassVar[str] = "vera"
    positions: ClassVar[tuple[str, ...]] = ("attention/(query|value)",)
    axes: ClassVar[Axes] = {"a": ("in", None), "b": (None, "out"), "lambda_b": ("out",)}

    def __post_init__(self) -> None:
        require_rank("VeRA", self.rank)
        require_dropout("VeRA", self.dropout)

    def init(self, rng: jax.Array, site: Site, args: tuple, output: Any) -> Variables:
        """Both vectors; raises `InputError` where the site is no matrix."""
        matrix = matrix_of(site, args[0], output, "VeRA")
        return {"lambda_d": jnp.full(self.rank, float(self.initial)), "lambda_b": jnp.zeros(matrix.outputs)}

    def state(self, rng: jax.Array, site: Site, args: tuple, output: Any, trained: Variables) -> Variables:
        """The random matrices, and with dropout a number that sets this layer's masks apart."""
        matrix = matrix_of(site, args[0], output, "VeRA")
        first, second = jax.random.split(jax.random.key(self.seed))
        return {
            "a": _uniform(first, (matrix.inputs, self.rank)),
            "b": _uniform(second, (self.rank, matrix.outputs)),
            **(dropout_seed(rng) if self.random else {}),
        }

    def apply(
        self, variables: Variables, site: Site, call: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        """The site's output plus the product."""
        y, x = call(*args, **kwargs), first_input(args, kwargs)
        x = matrix_of(site, x, y, "VeRA").flatten(x).astype(y.dtype)
        x = dropped(x, site, self.dropout, variables.get("seed"))
        cast = {name: variables[name].astype(y.dtype) for name in ("a", "b", "lambda_d", "lambda_b")}
        added = project(project(x, cast["a"]) * cast["lambda_d"], cast["b"]) * cast["lambda_b"]
        return y + added.reshape(y.shape)

    def scaled(self, variables: Variables, factor: Any) -> Variables:
        """The outer vector times the factor."""
        return {**variables, "lambda_b": variables["lambda_b"] * factor}

    def change(self, variables: Variables) -> jax.Array:
        """What is added to the kernel, `[..., in, out]`."""
        a = variables["a"] * variables["lambda_d"][..., None, :]
        return product(a, variables["b"] * variables["lambda_b"][..., None, :])


def _uniform(rng: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """He's uniform initialisation of a map from the first axis to the second."""
    bound = (6 / shape[0]) ** 0.5
    return jax.random.uniform(rng, shape, minval=-bound, maxval=bound)
