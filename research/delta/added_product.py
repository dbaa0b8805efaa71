"""Methods that add a product to a kernel: what their merging has in common."""

from __future__ import annotations

from abc import abstractmethod

import jax

from .methods import SiteMethod, Variables


class AddedProduct(SiteMethod):
    """A method whose site computes as if `change` were added to its kernel, or to its embedding's table."""

    dropout: float

    @property
    def random(self) -> bool:
        """Dropout draws."""
        return self.dropout > 0

    @abstractmethod
    def change(self, variables: Variables) -> jax.Array:
        """What is added to the kernel, `[..., in, out]`; stacked layers keep their leading axes."""

    def merge(self, variables: Variables, params: Variables, path: str) -> Variables:
        """The kernel plus the change, summed in single precision or better."""
        return self._shifted(variables, params, 1.0)

    def unmerge(self, variables: Variables, params: Variables, path: str) -> Variables:
        """The kernel less the change."""
        return self._shifted(variables, params, -1.0)

    def _shifted(self, variables: Variables, params: Variables, sign: float) -> Variables:
        name = "kernel" if "kernel" in params else "embedding"
        kernel, change = params[name], self.change(variables)
        return {**params, name: (kernel + sign * change.reshape(kernel.shape)).astype(kernel.dtype)}
