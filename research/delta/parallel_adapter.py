"""The parallel adapter (He et al., 2022, arXiv 2110.04366, table 1), beside a module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from ... import InputError
from .bottleneck import (
    features_of,
    first_of,
    require_activation,
    require_positive,
    scale_some,
    through,
    two_layers,
    with_first,
)
from .methods import Site, SiteMethod, Variables, first_input


@dataclass(frozen=True)
class ParallelAdapter(SiteMethod):
    """`y + scale up(activation(down(x)))` from a module's input `x [..., I]` to its output `y [..., D]`.

    Default positions are the attention and feed-forward layers as wholes, and 24 units and a scale of 1 the
    defaults, as in OpenDelta; the paper prefers the feed-forward layer alone, 512 units and a scale of 4
    (its "scaled parallel adapter"). Starts as `Adapter` does, exactly at the model.
    """

    width: int = 24
    activation: str = "gelu"
    scale: float = 1.0

    name: ClassVar[str] = "parallel_adapter"
    positions: ClassVar[tuple[str, ...]] = ("attention", "mlp")

    def __post_init__(self) -> None:
        require_positive("parallel adapter", width=self.width)
        require_activation("parallel adapter", self.activation)

    def init(self, rng: jax.Array, site: Site, args: tuple, output: Any) -> Variables:
        """Two layers with biases; raises `InputError` where input and output are no rows of features."""
        x, y = args[0], first_of(output)
        inputs = features_of(site, x, "a parallel adapter", "input")
        outputs = features_of(site, y, "a parallel adapter")
        if x.shape[:-1] != y.shape[:-1]:
            raise InputError(
                f"{site.path or 'the root module'}: a parallel adapter needs an output [..., D] for an input "
                f"[..., I], not {y.shape} for {x.shape}"
            )
        return two_layers(rng, inputs, self.width, outputs)

    def apply(
        self, variables: Variables, site: Site, call: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        """The output plus the bottleneck's, computed in the output's dtype."""
        output = call(*args, **kwargs)
        y = first_of(output)
        x = first_input(args, kwargs).astype(y.dtype)
        return with_first(output, y + self.scale * through(variables, self.activation, x))

    def scaled(self, variables: Variables, factor: Any) -> Variables:
        """What is added, `factor` times."""
        return scale_some(variables, ("up_kernel", "up_bias"), factor)
