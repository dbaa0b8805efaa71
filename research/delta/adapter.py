"""The bottleneck adapter (Houlsby et al., 2019, arXiv 1902.00751), after a module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax

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
from .methods import Axes, Site, SiteMethod, Variables


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
    axes: ClassVar[Axes] = {"down_kernel": ("out", None), "up_kernel": (None, "out"), "up_bias": ("out",)}

    def __post_init__(self) -> None:
        require_positive("adapter", width=self.width)
        require_activation("adapter", self.activation)

    def init(self, rng: jax.Array, site: Site, args: tuple, output: Any) -> Variables:
        """Two layers with biases; raises `InputError` where the output is no array of features."""
        size = features_of(site, first_of(output), "an adapter")
        return two_layers(rng, size, self.width, size)

    def apply(
        self, variables: Variables, site: Site, call: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        """The adapted output, computed in the output's dtype."""
        output = call(*args, **kwargs)
        y = first_of(output)
        return with_first(output, y + through(variables, self.activation, y))

    def scaled(self, variables: Variables, factor: Any) -> Variables:
        """What is added, `factor` times."""
        return scale_some(variables, ("up_kernel", "up_bias"), factor)
