"""The bottleneck adapter (Houlsby et al., 2019, arXiv 1902.00751), after a module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ... import InputError
from .methods import Site, SiteMethod, Variables

ACTIVATIONS = {"gelu": jax.nn.gelu, "relu": jax.nn.relu, "silu": jax.nn.silu, "tanh": jnp.tanh}


@dataclass(frozen=True)
class Adapter(SiteMethod):
    """`y + up(activation(down(y)))` on a module's output `y [..., D]`, through `width` units.

    Default positions are the outputs of attention and of the feed-forward layer, as in OpenDelta, and so
    are the 24 units and the tanh-approximated GELU. `up` and the biases start at zero, so the model
    starts exactly where it was, and `down` uniform in ±1/sqrt(D) (He et al., 2022, arXiv 2110.04366,
    section 4.1); OpenDelta's N(0, 0.01) in both starts close to it instead. Of several outputs the first
    is adapted.
    """

    width: int = 24
    activation: str = "gelu"

    name: ClassVar[str] = "adapter"
    positions: ClassVar[tuple[str, ...]] = ("attention/output", "mlp/down")

    def __post_init__(self) -> None:
        if self.width < 1:
            raise InputError(f"adapter width={self.width} must be at least 1")
        if self.activation not in ACTIVATIONS:
            raise InputError(f"adapter activation={self.activation!r} is not one of {', '.join(ACTIVATIONS)}")

    def init(self, rng: jax.Array, site: Site, args: tuple, output: Any) -> Variables:
        """Two layers with biases; raises `InputError` where the output is no array of features."""
        y = output[0] if isinstance(output, tuple) else output
        if not getattr(y, "ndim", 0) or not jnp.issubdtype(y.dtype, jnp.floating):
            raise InputError(f"{site.path}: an adapter needs an output [..., D] of floats, not {y}")
        size = y.shape[-1]
        bound = size**-0.5
        return {
            "down_kernel": jax.random.uniform(rng, (size, self.width), minval=-bound, maxval=bound),
            "down_bias": jnp.zeros(self.width),
            "up_kernel": jnp.zeros((self.width, size)),
            "up_bias": jnp.zeros(size),
        }

    def apply(
        self, variables: Variables, site: Site, call: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        """The adapted output, computed in the output's dtype."""
        output = call(*args, **kwargs)
        y = output[0] if isinstance(output, tuple) else output
        cast = {key: value.astype(y.dtype) for key, value in variables.items()}
        hidden = ACTIVATIONS[self.activation](y @ cast["down_kernel"] + cast["down_bias"])
        adapted = y + (hidden @ cast["up_kernel"] + cast["up_bias"])
        return (adapted, *output[1:]) if isinstance(output, tuple) else adapted
