"""OFT: a kernel's input is rotated, block by block (Qiu et al., 2023, arXiv 2306.07280)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ... import InputError
from .low_rank import wide
from .matrices import contracted_matrix, matrix_of
from .methods import Site, SiteMethod, Variables, first_input


@dataclass(frozen=True)
class OFT(SiteMethod):
    """`f(x R)` with R block-diagonal and orthogonal: `R = (I + Q)(I - Q)⁻¹`, Cayley's map of a skew Q.

    `blocks [count, n(n-1)/2]` are the upper triangles of the Qs, row by row, for `count = in / block_size`
    blocks of `n = block_size`; at zero R is the identity, where training starts. Angles between neurons do
    not change, so neither does what the paper calls hyperspherical energy.

    With `neumann_terms = k`, at least 4, the inverse is a series, `R ≈ I + 2Q + ... + 2Q^(k-2) + Q^(k-1)`,
    orthogonal only near zero; PEFT does so by default with 5. Its exact form has the opposite sign of Q:
    such adapters compute the same here with their numbers negated. PEFT's block size is 32, and so is
    this. Default positions: attention's query and value, as PEFT's. Works at Dense and DenseGeneral.
    """

    block_size: int = 32
    neumann_terms: int = 0

    name: ClassVar[str] = "oft"
    positions: ClassVar[tuple[str, ...]] = ("attention/(query|value)",)

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise InputError(f"OFT block_size={self.block_size} must be at least 2")
        if self.neumann_terms and self.neumann_terms < 4:
            raise InputError(f"OFT neumann_terms={self.neumann_terms} must be 0 (exact) or at least 4")

    def init(self, rng: jax.Array, site: Site, args: tuple, output: Any) -> Variables:
        """Zeros; raises `InputError` where the site is no matrix or blocks do not fit its inputs."""
        inputs = matrix_of(site, args[0], output, "OFT").inputs
        size = self.block_size
        if inputs % size:
            fitting = [n for n in range(2, inputs + 1) if inputs % n == 0]
            raise InputError(
                f"{site.path}: OFT block_size={size} does not divide its {inputs} inputs; "
                f"{min(fitting, key=lambda n: abs(n - size))} does"
            )
        return {"blocks": jnp.zeros((inputs // size, size * (size - 1) // 2))}

    def apply(
        self, variables: Variables, site: Site, call: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        """The site's output for its input rotated."""
        x, blocks = first_input(args, kwargs), variables["blocks"]
        matrix = contracted_matrix(site, x, blocks.shape[-2] * self.block_size)
        flat = matrix.flatten(x)
        parts = flat.reshape(*flat.shape[:-1], -1, self.block_size)
        turned = jnp.einsum("...ck,ckn->...cn", parts, self.rotation(blocks).astype(x.dtype))
        x = matrix.restore(turned.reshape(flat.shape), x.shape)
        if args:
            return call(x, *args[1:], **kwargs)
        return call(**{**kwargs, next(iter(kwargs)): x})

    def merge(self, variables: Variables, params: Variables, path: str) -> Variables:
        """The kernel rotated from its input's side."""
        kernel, rotation = self._parts(variables, params), self.rotation(variables["blocks"])
        return _with_kernel(params, jnp.matmul(rotation, kernel, precision="highest"))

    def unmerge(self, variables: Variables, params: Variables, path: str) -> Variables:
        """The kernel rotated back."""
        kernel, rotation = self._parts(variables, params), self.rotation(variables["blocks"])
        return _with_kernel(params, jnp.linalg.solve(rotation, kernel))

    def rotation(self, blocks: jax.Array) -> jax.Array:
        """The blocks of R, `[..., count, n, n]`."""
        size = self.block_size
        rows, columns = np.triu_indices(size, 1)
        upper = jnp.zeros((*blocks.shape[:-1], size, size), blocks.dtype).at[..., rows, columns].set(blocks)
        skew = upper - jnp.swapaxes(upper, -1, -2)
        identity = jnp.eye(size, dtype=blocks.dtype)
        if not self.neumann_terms:
            return jnp.linalg.solve(identity - skew, identity + skew)
        power, total = skew, identity + 2 * skew
        for exponent in range(2, self.neumann_terms):
            power = jnp.matmul(power, skew, precision="highest")
            total = total + (1 if exponent == self.neumann_terms - 1 else 2) * power
        return total

    def _parts(self, variables: Variables, params: Variables) -> jax.Array:
        """The kernel by blocks of its input, `[..., count, n, out]`."""
        return wide(params["kernel"], (*variables["blocks"].shape[:-1], self.block_size, -1))


def _with_kernel(params: Variables, parts: jax.Array) -> Variables:
    kernel = params["kernel"]
    return {**params, "kernel": parts.reshape(kernel.shape).astype(kernel.dtype)}
