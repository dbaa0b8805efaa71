"""The table of layers of a configuration: what the planner has to know of a Transformer.

Counts of parameters come from the shapes of one period of layers; bytes and operations are those of
Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022), section 4,
written out per product so that gated mlps, grouped keys and a kernel that stores no scores come out too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax

from ... import InputError
from ...models.attention import GroupedQuery
from ...models.axes import TRANSFORMER_AXES
from ...models.config import TransformerConfig
from ...models.costs import abstract_parameters, training_flops_per_token
from ...models.mlp import MLP, GatedMLP
from ...models.transformer import Transformer
from ...models.word_losses import AUTOMATIC_BYTES
from ...parallel.plan import Layer, LayerTable, Recipe, Remat
from ...parallel.rules import axis_names, leaf_path

SPLIT_OVER_TENSOR = {"heads", "kv_heads", "mlp", "vocab"}
VOCAB_MULTIPLE = 128
CHUNKS = 16  # parts in which a chunked loss computes the logits
LOGITS = 8  # bytes a logit in float32 with its gradient, beside one in the type of the products


@dataclass(frozen=True)
class Sizes:
    """Widths of one layer; `keys`: how many each query is multiplied with; `bytes`: of a number kept;
    `padding`: what the tiles of a kernel's arrays add to a head's width, in heads; `ours`: kept as the train
    step of this repository does.
    """

    width: int
    heads: int
    key_heads: int
    mlp: int
    up: int
    keys: float
    bytes: float
    padding: float
    flash: bool
    dropout: bool
    ours: bool

    @classmethod
    def of(
        cls,
        config: TransformerConfig,
        attention: GroupedQuery | None,
        mlp: MLP | GatedMLP | None,
        length: int,
        recipe: Recipe,
        flash: bool,
        lanes: int,
    ) -> Sizes:
        """Those of a layer; an absent sublayer has width 0."""
        wide = attention.width_of_head(config.width) if attention else 0
        heads, groups = (attention.heads, attention.groups) if attention else (0, 0)
        hidden = (mlp.width or 4 * config.width) if mlp else 0
        reach = min(attention.window or length, length) if attention and flash else length
        seen: float = min(2 * reach, length)
        if config.kind == "decoder" and flash:
            seen = reach - reach**2 / (2 * length)
        return cls(
            *(config.width, heads * wide, groups * wide, hidden, 2 if isinstance(mlp, GatedMLP) else 1),
            *(seen, recipe.compute, -wide % lanes / wide if wide else 0.0),
            *(flash, config.dropout > 0, recipe.name == "modicum"),
        )

    def scores(self, heads: int, length: int) -> float:
        """Bytes a token of attention scores where a kernel stores them, else of their log-sum-exp."""
        if self.flash:
            return 4.0 * heads
        return heads * length * (self.bytes * 2 + 1 if self.dropout else self.bytes)


def layer_table(
    config: TransformerConfig,
    length: int,
    recipe: Recipe,
    *,
    name: str = "the model",
    flash: bool = True,
    chunked: bool | None = False,
    lanes: int = 1,
) -> LayerTable:
    """The planner's table of a decoder or encoder at one length, its vocabulary padded to a multiple of 128.

    Without `flash`, attention's scores are stored; with `chunked`, logits are computed in 16 parts, with None
    in as many as `modicum train` computes them. `lanes` are those of the chip (`Chip.lanes`). Raises
    InputError for an encoder-decoder.
    """
    if config.kind == "encoder-decoder":
        raise InputError(f"{name} is an encoder-decoder; plans are made for decoders and encoders")
    config = replace(config, vocab_multiple=math.lcm(config.vocab_multiple, VOCAB_MULTIPLE))
    counts, beside = count_parameters(config)
    period = [
        _layer(config, index, counts[index], length, recipe, flash, lanes) for index in range(config.period)
    ]
    layers = tuple(period[index % config.period] for index in range(config.layers))
    useful = training_flops_per_token(replace(config, scan=True), length)  # traces one period, not all layers
    return LayerTable(
        name, layers, _ends(config, beside, recipe, chunked), useful, {"tensor": _sizes(config)}
    )


Count = tuple[int, int]  # parameters, and those of them that tensor parallelism splits


@lru_cache(64)
def count_parameters(config: TransformerConfig) -> tuple[tuple[Count, ...], Count]:
    """Numbers of each layer of the pattern, and of everything outside the stack."""
    one = replace(config, layers=config.period, scan=False)
    tree = abstract_parameters(Transformer(one))
    names = axis_names(tree, TRANSFORMER_AXES)
    layers, beside = [(0, 0)] * config.period, (0, 0)

    def add(count: Count, leaf: Any, axes: tuple[str | None, ...]) -> Count:
        size = math.prod(leaf.shape)
        return count[0] + size, count[1] + (size if SPLIT_OVER_TENSOR & set(axes) else 0)

    for (key_path, leaf), axes in zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(names, is_leaf=_is_names)
    ):
        first = leaf_path(key_path).split("/")[0]
        if first.startswith("layers_"):
            index = int(first.removeprefix("layers_"))
            layers[index] = add(layers[index], leaf, axes)
        else:
            beside = add(beside, leaf, axes)
    return tuple(layers), beside


def _is_names(value: Any) -> bool:
    return isinstance(value, tuple)


def _layer(
    config: TransformerConfig,
    index: int,
    count: Count,
    length: int,
    recipe: Recipe,
    flash: bool,
    lanes: int,
) -> Layer:
    attention, mlp = config.layer(index)
    own_attention = None if config.lacks(index, "attention") else attention
    if not isinstance(mlp, MLP | GatedMLP):
        raise InputError(f"plans are for dense layers; {type(mlp).__name__} has no cost table yet")
    own_mlp = None if config.lacks(index, "mlp") else mlp
    size = Sizes.of(config, own_attention, own_mlp, length, recipe, flash, lanes)
    stored = size.scores(own_attention.heads if own_attention else 0, length)
    core = 4.0 * size.heads * size.keys  # scores and weighted values
    flops = 2.0 * count[0] + core
    sublayers = (own_attention is not None) + (own_mlp is not None)
    remats = _remats(size, sublayers, flops, core, stored)
    # at work not all of it is there at once: tiles, which only lengthen that sum, are left out of it
    kept, byte = _remats(replace(size, padding=0.0), sublayers, flops, core, stored)[0], size.bytes
    return Layer(
        name=f"layer {index}",
        parameters=count[0],
        split_parameters=count[1],
        flops=flops,
        stream=byte * size.width,
        remats=remats,
        reductions=sublayers,
        keys=2 * byte * size.key_heads,
        traffic=_traffic(size, sublayers, 0.0 if flash else stored),
        whole=kept.whole + 2 * byte * size.width,
        split=kept.split + byte * size.mlp * size.up + (0.0 if flash else stored),
    )


def _remats(size: Sizes, sublayers: int, flops: float, core: float, stored: float) -> tuple[Remat, ...]:
    """The policies of `models.remat`: what each keeps a token, and what it computes again.

    The layer's last product is never computed again: no gradient depends on what comes out of it.
    """
    byte, stream = size.bytes, size.bytes * size.width
    projected = byte * (size.heads + 2 * size.key_heads)
    hidden = byte * size.mlp * size.up
    masks = size.width * sublayers if size.dropout else 0
    activated = byte * size.mlp * (size.up if size.up > 1 else 1)  # gated: the activation and the product
    split = projected + byte * size.heads + hidden + activated + stored
    whole = flops - 2.0 * size.width * (size.mlp or size.heads)
    last = 2.0 * size.width * size.heads if size.mlp else 0.0  # attention's output product
    first = 2.0 * size.width * (size.heads + 2 * size.key_heads)
    both = max(1, sublayers) * stream  # the input, and the stream between the sublayers
    nothing = Remat("none", 2 * stream * sublayers + masks, split, 0.0)
    if size.ours:
        # products keep what they multiply, gathered where tensor splits the stream; XLA merges equals; and
        # attention's kernel its queries, keys, values and outputs, as they lie in its tiles
        copies = float(size.heads > 0) + float(size.mlp > 0)
        kept = split + byte * size.heads + size.padding * (projected + byte * size.heads)
        nothing = Remat("none", stream * sublayers + masks, kept, 0.0, gathered=copies * stream)
    return (
        nothing,
        Remat("dots", both, projected + hidden, core),
        Remat("mlp", both, projected, whole - last - first),
        Remat("middle", both, 0.0, whole - last),
        Remat("full", stream, 0.0, whole, max(0, sublayers - 1)),
    )


def _traffic(size: Sizes, sublayers: int, stored: float) -> float:
    """Bytes a token read and written forward outside products: norms, residuals, activations, rotations,
    scores.
    """
    stream = size.bytes * size.width
    activation = size.bytes * size.mlp * (1 + size.up)
    rotation = 2 * size.bytes * (size.heads + size.key_heads)
    return 5 * stream * sublayers + activation + rotation + 4 * stored


def _ends(
    config: TransformerConfig, beside: Count, recipe: Recipe, chunked: bool | None
) -> tuple[Layer, ...]:
    """Embedding and head; a tied table is counted in the embedding."""
    stream, table = recipe.compute * config.width, config.padded_vocab * config.width
    untied = 0 if config.tied else config.vocab * config.width
    each = recipe.compute + LOGITS
    embedding = Layer(
        *("embedding", beside[0] - untied, beside[1] - untied, 0.0, stream),
        (Remat("none", 0.0, 0.0, 0.0),),
        reductions=0.5,
    )
    head = Layer(
        *("head", untied, untied, 2.0 * table, stream),
        (Remat("none", 2 * stream, 0.0, 0.0),),
        reductions=0.5,
        traffic=4 * stream + each * config.padded_vocab,
        split=each * config.padded_vocab / (CHUNKS if chunked else 1),
        most=AUTOMATIC_BYTES * each / 4 if chunked is None else math.inf,
    )
    return embedding, head


def _sizes(config: TransformerConfig) -> dict[str, int]:
    """What tensor parallelism has to divide; a vocabulary is padded to fit, a single key/value head is
    copied.
    """
    sizes = {}
    for index in range(config.period):
        attention, mlp = config.layer(index)
        sizes[f"heads of layer {index}"] = attention.heads
        if attention.groups > 1:
            sizes[f"key/value heads of layer {index}"] = attention.groups
        sizes[f"mlp width of layer {index}"] = mlp.width or 4 * config.width
    return sizes
