"""`TransformerConfig`: a Transformer as a value, composed of choices that build themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from .. import InputError
from .attention import GroupedQuery
from .experts import RoutedMLP
from .mlp import MLP, GatedMLP
from .moefied import MoefiedMLP
from .norms import LayerNorm, Norm
from .positions import Learned, Positions
from .precision import Precision
from .products import dense_product, scaled_product
from .remat import Runs, remat_runs
from .residuals import PreNorm, Residual

FeedForward = MLP | GatedMLP | MoefiedMLP | RoutedMLP
Kind = Literal["decoder", "encoder", "encoder-decoder"]
KINDS = ("decoder", "encoder", "encoder-decoder")
SUBLAYERS = ("attention", "mlp")


@dataclass(frozen=True)
class Layer:
    """What one layer of a pattern has in place of the configuration's attention or mlp.

    `without` names the sublayers, "attention" or "mlp", that it lacks with their norms (compressed CPM).
    """

    attention: GroupedQuery | None = None
    mlp: FeedForward | None = None
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.without:
            if name not in SUBLAYERS:
                raise InputError(f"a layer cannot be without {name!r}; valid: {', '.join(SUBLAYERS)}")


@dataclass(frozen=True)
class TransformerConfig:
    """A decoder, an encoder or an encoder-decoder, from its parts.

    `layers` counts each stack's layers, `decoder_layers` the decoder's of an encoder-decoder where it has
    another number. `pattern` gives layers that differ, repeated to the full depth
    (two entries: even and odd layers). `scan` runs the layers as one scanned body with stacked
    parameters: compile time does not grow with depth. `remat` is what the backward pass computes again, a
    name from `remat` for all layers or runs of layers such as "full:8,none:4".

    The embedding table has a row for each word, then `input_rows` that are inputs only (CPM-Ant's prompts),
    padded to a `vocab_multiple`; only words have logits. Its rows are `embedding_width` wide (0: D; else a
    projection leads to D, as in OPT-350m). `embedding_scale` 0 means sqrt(D), as in the original Transformer.
    `token_types` counts the kinds of tokens that have a vector of their own (BERT's sentences A and B).
    `scaled_linears` divides every product by the square root of its input's width (CPM).
    """

    kind: Kind = "decoder"
    layers: int = 12
    decoder_layers: int = 0
    width: int = 768
    vocab: int = 50_257
    input_rows: int = 0
    token_types: int = 0
    attention: GroupedQuery = GroupedQuery()
    mlp: FeedForward = MLP()
    norm: Norm = LayerNorm()
    positions: Positions = Learned()
    residual: Residual = PreNorm()
    pattern: tuple[Layer, ...] = ()
    tied: bool = True
    embedding_width: int = 0
    embedding_norm: bool = False
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    vocab_multiple: int = 1
    scaled_linears: bool = False
    dropout: float = 0.0
    initial_std: float = 0.02
    scan: bool = False
    remat: str = "none"
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        for field in ("layers", "width", "vocab", "vocab_multiple"):
            if getattr(self, field) < 1:
                raise InputError(f"{field}={getattr(self, field)} must be at least 1")
        for field in ("decoder_layers", "input_rows", "token_types", "embedding_width"):
            if getattr(self, field) < 0:
                raise InputError(f"{field}={getattr(self, field)} must be at least 0")
        if self.kind not in KINDS:
            raise InputError(f"kind={self.kind!r} is not one of {', '.join(KINDS)}")
        self._check_remat()
        for depth in (self.layers, self.depth_of_decoder):
            if depth % self.period:
                raise InputError(f"{depth} layers are not a multiple of the pattern's {self.period}")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"dropout={self.dropout} must be at least 0 and below 1")
        for index in range(self.period):
            self.layer(index)[0].width_of_head(self.width)

    @property
    def period(self) -> int:
        """How many layers the pattern has before it repeats."""
        return max(1, len(self.pattern))

    @property
    def remat_runs(self) -> Runs:
        """(policy, layers) from the first layer on."""
        return remat_runs(self.remat, self.layers)

    def _check_remat(self) -> None:
        runs = self.remat_runs
        if len(runs) > 1 and self.kind == "encoder-decoder":
            raise InputError(f"remat={self.remat!r}: an encoder-decoder takes one policy for all layers")
        if self.scan and any(count % self.period for _, count in runs):
            raise InputError(
                f"remat={self.remat!r}: scanned layers come in periods of {self.period} with one policy each"
            )

    @property
    def depth_of_decoder(self) -> int:
        """Layers of the decoder."""
        return self.decoder_layers or self.layers

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding table."""
        return -(-(self.vocab + self.input_rows) // self.vocab_multiple) * self.vocab_multiple

    def lacks(self, index: int, sublayer: str) -> bool:
        """Whether layer `index` has no such sublayer."""
        return bool(self.pattern) and sublayer in self.pattern[index % self.period].without

    def layer(self, index: int) -> tuple[GroupedQuery, FeedForward]:
        """Attention and mlp of layer `index`."""
        own = self.pattern[index % self.period] if self.pattern else Layer()
        return own.attention or self.attention, own.mlp or self.mlp

    def linear(self, features: int, bias: bool, *, name: str, residual: bool = False) -> nn.Dense:
        """A dense layer with a kernel `[in, features]` in this configuration's precision.

        Kernels that write to the residual stream start smaller, by 1 / sqrt(2 L), so that its variance
        does not grow with depth (Radford et al., GPT-2, 2019, section 2.3). Scaled ones all start at 1.
        """
        std = self.initial_std / (np.sqrt(2 * self.layers) if residual else 1.0)
        std = 1.0 if self.scaled_linears else std
        return nn.Dense(
            features,
            use_bias=bias,
            dtype=jnp.dtype(self.precision.compute),
            param_dtype=jnp.dtype(self.precision.param),
            kernel_init=nn.initializers.normal(std),
            dot_general=scaled_product if self.scaled_linears else dense_product,
            name=name,
        )
