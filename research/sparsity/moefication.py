"""From a dense Transformer to one whose feed-forward layers compute some experts of each token.

Zhang et al., "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts", 2022: group the neurons,
make a router that foresees the groups' activation, compute the chosen groups only. No weight is changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from ... import InputError
from ...models.config import FeedForward, TransformerConfig
from ...models.kernels.sparse import Experts
from ...models.mlp import MLP, GatedMLP
from ...models.model import Params
from ...models.moefied import MoefiedMLP
from ...models.selection import MLPSelection, Selection
from ...models.transformer import Transformer
from .feed_forward import Layers, capture_inputs, elementwise, regrouped
from .partitions import Clusters, Partition, centres, expert_count
from .quality import Captured, captured
from .routing import Fitting, fit_selection
from .statistics import Batch

HELD_OUT = 0.1


@dataclass(frozen=True)
class Moefication:
    """What to make: `share` of the neurons for each token, in experts of `neurons` n.

    `tokens` of the data are read to build experts and routers; a tenth of them only to measure.
    """

    share: float = 0.2
    neurons: int = 32
    partition: Partition = Clusters()
    selection: Selection = MLPSelection()
    tokens: int = 8192
    fitting: Fitting = Fitting()
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise InputError(f"share={self.share} of the neurons must be above 0 and at most 1")
        if self.tokens < 10:
            raise InputError(f"tokens={self.tokens} must be at least 10")

    def chosen(self, experts: int) -> int:
        """Experts a token."""
        return max(1, round(self.share * experts))


@dataclass(frozen=True)
class Moefied:
    """The converted model, and by layer what its choice of experts keeps on tokens that were held out."""

    model: Transformer
    params: Params
    kept: Mapping[str, Captured]

    def rows(self) -> list[dict[str, Any]]:
        """A table, one row a layer."""
        return [
            {"layer": name, "captured mass": one.mass, "best possible": one.best, "recall": one.recall}
            for name, one in self.kept.items()
        ]


def moefy(
    model: Transformer, params: Params, batches: Iterable[Batch], wanted: Moefication | None = None
) -> Moefied:
    """`model` with its feed-forward layers in experts; layers that were scanned are unrolled.

    Raises `InputError` where neurons do not divide into experts, and for a model that is converted already.
    """
    wanted = wanted or Moefication()
    layers = Layers.of(model, params)
    config = moefied_config(layers.model.config, wanted)
    inputs = capture_inputs(layers, batches, wanted.tokens)
    made: dict[str, Params] = {}
    kept: dict[str, Captured] = {}
    for path in layers.dense:
        made[path], kept[path] = convert_layer(layers, path, inputs[path], wanted)
    return Moefied(replace(model, config=config), grafted(layers.params, made), kept)


def convert_layer(
    layers: Layers, path: str, inputs: np.ndarray, wanted: Moefication
) -> tuple[Params, Captured]:
    """The parameters of one converted layer, and what its choice keeps; `inputs [N, D]` are its own."""
    dense = layers.dense[path]
    count = expert_count(dense.count, wanted.neurons)
    if len(inputs) < 2:
        raise InputError(f"{path}: {len(inputs)} token to make experts from and to measure; give more")
    held_out = max(1, int(HELD_OUT * len(inputs)))
    seen, unseen = inputs[held_out:], inputs[:held_out]
    groups = wanted.partition.groups(dense, seen, count, wanted.seed)
    experts = regrouped(dense, groups)
    router = fit_selection(wanted.selection, experts, centres(dense, groups), seen, wanted.fitting)
    found = layer_parameters(experts, router)
    return found, captured(wanted.selection, router, experts, unseen, wanted.chosen(count))


def layer_parameters(experts: Experts, router: Params) -> Params:
    """The parameters of the module `mlp` of a `MoefiedMLP`."""
    arrays = {name: leaf for name, leaf in vars(experts).items() if isinstance(leaf, jax.Array)}
    return {"experts": arrays, **({"selection": router} if router else {})}


def moefied_config(config: TransformerConfig, wanted: Moefication) -> TransformerConfig:
    """The configuration with every feed-forward choice in experts, layers unrolled."""

    def moved(choice: FeedForward) -> MoefiedMLP:
        if not isinstance(choice, MLP | GatedMLP):
            raise InputError(f"mlp is a {type(choice).__name__}; an MLP or a GatedMLP can be converted")
        width = choice.width or 4 * config.width
        experts = expert_count(width, wanted.neurons)
        return MoefiedMLP(
            width,
            experts,
            wanted.chosen(experts),
            elementwise(choice),
            choice.bias,
            isinstance(choice, GatedMLP),
            wanted.selection,
        )

    pattern = tuple(
        layer if layer.mlp is None else replace(layer, mlp=moved(layer.mlp)) for layer in config.pattern
    )
    return replace(config, mlp=moved(config.mlp), pattern=pattern, scan=False)


def grafted(params: Params, parts: Mapping[str, Params]) -> Params:
    """The tree with other subtrees at these `/` paths."""
    for path, part in parts.items():
        params = _grafted(params, path.split("/"), part)
    return params


def _grafted(params: Params, names: list[str], part: Params) -> Params:
    return {**params, names[0]: _grafted(params[names[0]], names[1:], part)} if names else part
