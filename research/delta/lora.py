"""LoRA: a low-rank product beside a weight matrix (Hu et al., 2022, arXiv 2106.09685)."""

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
    require_fit,
    require_rank,
    through,
    uniform,
    wide,
)
from .matrices import matrix_of
from .methods import Axes, Site, Variables, first_input

DRAWN = ("uniform", "gaussian")
FROM_KERNEL = ("pissa", "olora")


@dataclass(frozen=True)
class LoRA(AddedProduct):
    """`y + s (dropout(x) A) B` where a kernel is, A `[in, rank]`, B `[rank, out]`, `s = alpha / rank`.

    `rank_stabilised`: `s = alpha / sqrt(rank)` (Kalajdzievski, 2023, arXiv 2312.03732). `initialisation`:

    * "uniform": A uniform in ±1/sqrt(in), which is PyTorch's `kaiming_uniform(a=sqrt(5))` as PEFT uses it,
      and B zero. "gaussian": A from N(0, 1/rank²), as PEFT has it, and B zero.
    * "pissa": `s A B` is the kernel's part of its largest singular values (Meng et al., 2024, arXiv
      2404.02948, equations 2-4), "olora": `A B` is that of the first columns of its QR decomposition, taken
      of `[out, in]` (Büyükakyüz, 2024, arXiv 2406.01775). Those works take the product away from the kernel;
      here the backbone stays as it is, and the product's start, kept as state, is subtracted:
      `y + s ((dropout(x) A) B - (x A_start) B_start)`.

    Every one of them starts the model exactly where it was. Works at Dense and DenseGeneral (axes flattened)
    and at Flax's `Embed`, where A `[V, rank]` is zero, B from N(0, 1) and nothing is dropped, as in PEFT. A
    table that also makes the logits (`attend`) is adapted where it embeds alone; merging changes both.
    Default positions: attention's query and value, as in the paper. Computed in the site's own dtype.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rank_stabilised: bool = False
    initialisation: str = "uniform"

    name: ClassVar[str] = "lora"
    positions: ClassVar[tuple[str, ...]] = ("attention/(query|value)",)
    axes: ClassVar[Axes] = {
        "a": ("in", None),
        "b": (None, "out"),
        "start_a": ("in", None),
        "start_b": (None, "out"),
    }

    def __post_init__(self) -> None:
        require_rank("LoRA", self.rank)
        require_alpha("LoRA", self.alpha)
        require_dropout("LoRA", self.dropout)
        if self.initialisation not in (known := DRAWN + FROM_KERNEL):
            raise InputError(f"LoRA initialisation={self.initialisation!r} is not one of {', '.join(known)}")
        if self.initialisation == "pissa" and self.alpha <= 0:
            raise InputError(f"LoRA alpha={self.alpha} must be above 0 for initialisation='pissa'")

    @property
    def reads(self) -> bool:
        """PiSSA and OLoRA start from the kernel."""
        return self.initialisation in FROM_KERNEL

    @property
    def scale(self) -> float:
        """Factor of the product."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)

    def init(self, rng: jax.Array, site: Site, args: tuple, output: Any) -> Variables:
        """A and B; raises `InputError` where the site is no matrix or the rank exceeds it."""
        if _is_table(site):
            return self._init_table(rng, site)
        matrix = fitting_matrix(site, args[0], output, "LoRA", self.rank)
        size = matrix.inputs, matrix.outputs
        if self.reads:
            kernel = wide(site.params["kernel"], size)
            return (self._pissa if self.initialisation == "pissa" else self._olora)(kernel)
        if self.initialisation == "gaussian":
            a = jax.random.normal(rng, (matrix.inputs, self.rank)) / self.rank
        else:
            a = uniform(rng, matrix.inputs, self.rank)
        return {"a": a, "b": jnp.zeros((self.rank, matrix.outputs))}

    def state(self, rng: jax.Array, site: Site, args: tuple, output: Any, trained: Variables) -> Variables:
        """With dropout a number that sets this layer's masks apart, and what the product starts as."""
        seed = dropout_seed(rng) if self.random else {}
        start = {"start_a": trained["a"], "start_b": trained["b"]} if self.reads else {}
        return {**seed, **start}

    def apply(
        self, variables: Variables, site: Site, call: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        """The site's output plus the product."""
        y, x = call(*args, **kwargs), first_input(args, kwargs)
        if _is_table(site):
            rows = jnp.take(variables["a"], x, axis=0).astype(y.dtype)
            return y + (rows @ variables["b"].astype(y.dtype)) * self.scale
        x = matrix_of(site, x, y, "LoRA").flatten(x).astype(y.dtype)
        seen = dropped(x, site, self.dropout, variables.get("seed"))
        added = through(seen, variables["a"], variables["b"], self.scale)
        if self.reads:
            # Apart and not as one product of twice the rank: computed alike they cancel to the last bit.
            added = added - through(x, variables["start_a"], variables["start_b"], self.scale)
        return y + added.reshape(y.shape)

    def scaled(self, variables: Variables, factor: Any) -> Variables:
        """B times the factor; raises `InputError` where the product did not start at zero."""
        if self.reads:
            raise InputError(
                f"LoRA(initialisation={self.initialisation!r}) cannot be scaled: its effect is the change "
                f"since the start, which is linear in none of its variables; convert it to plain LoRA first"
            )
        return {**variables, "b": variables["b"] * factor}

    def change(self, variables: Variables) -> jax.Array:
        """What is added to the kernel, `[..., in, out]`."""
        change = product(variables["a"], variables["b"])
        if self.reads:
            change = change - product(variables["start_a"], variables["start_b"])
        return change * self.scale

    def _init_table(self, rng: jax.Array, site: Site) -> Variables:
        if self.reads:
            raise InputError(
                f"{site.path}: LoRA initialisation={self.initialisation!r} is for kernels, this is an "
                f"embedding; give it one of {', '.join(DRAWN)}"
            )
        rows, width = site.params["embedding"].shape
        require_fit(site.path, "LoRA", self.rank, rows, width)
        return {"a": jnp.zeros((rows, self.rank)), "b": jax.random.normal(rng, (self.rank, width))}

    def _pissa(self, kernel: jax.Array) -> Variables:
        left, values, right = jnp.linalg.svd(kernel, full_matrices=False)
        roots = jnp.sqrt(values[: self.rank] / self.scale)
        return {"a": left[:, : self.rank] * roots, "b": roots[:, None] * right[: self.rank]}

    def _olora(self, kernel: jax.Array) -> Variables:
        q, r = jnp.linalg.qr(kernel.T)
        return {"a": r[: self.rank].T, "b": q[:, : self.rank].T}


def _is_table(site: Site) -> bool:
    """Whether the site looks rows up, as Linen's `nn.Embed` and NNX's do."""
    return "embedding" in site.params and hasattr(site.module, "num_embeddings")
