"""T5 (Raffel et al., 2020): version 1.0 (ReLU, tied) and 1.1 (GeGLU, untied), and its encoder alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ... import InputError
from .. import MLP, GatedMLP, GroupedQuery, PreNorm, RelativeBuckets, RMSNorm, TransformerConfig
from ..heads import Head, LanguageModelHead
from ..model import Params
from ..transformer import Transformer
from .family import ACTIVATIONS, Family, choice, their_activation
from .mapping import Entry, Rows, Transposed, linear, norm
from .settings import Settings

ENCODER = "T5EncoderModel"


def read(settings: Settings) -> TransformerConfig:
    """The configuration of a T5; that of its encoder where config.json names `T5EncoderModel`."""
    settings.ignore("classifier_dropout", "initializer_factor", "n_positions")
    settings.require("is_decoder", False)
    width, layers = settings.take("d_model", 512), settings.take("num_layers", 6)
    alone = settings.values.get("architectures") == [ENCODER]
    tied, scaled = _ties(settings)
    buckets = settings.take("relative_attention_num_buckets", 32)
    decoder = settings.take("num_decoder_layers", None) or layers
    return TransformerConfig(
        kind="encoder" if alone else "encoder-decoder",
        layers=layers,
        decoder_layers=0 if alone or decoder == layers else decoder,
        width=width,
        vocab=settings.take("vocab_size", 32_128),
        # The initial weights make up for the missing division by sqrt(K).
        attention=GroupedQuery(
            settings.take("num_heads", 8), head_width=settings.take("d_kv", 64), bias=False, scale=1.0
        ),
        mlp=_mlp(settings),
        norm=RMSNorm(settings.take("layer_norm_epsilon", 1e-6)),
        positions=RelativeBuckets(buckets, settings.take("relative_attention_max_distance", 128)),
        residual=PreNorm(),
        tied=tied,
        logit_scale=width**-0.5 if scaled else 1.0,
        dropout=settings.take("dropout_rate", 0.1),
    )


def _ties(settings: Settings) -> tuple[bool, bool]:
    """Whether the logits come from the embedding table, and whether they are divided by sqrt(D).

    `tie_word_embeddings=false` means version 1.1: no division. `transformers` 5 turns it into true and
    `scale_decoder_outputs=false`; the model then has a matrix of its own for the logits if the file has one.
    """
    tied = settings.take("tie_word_embeddings", True) is not False
    scaled = settings.take("scale_decoder_outputs", tied)
    if not (tied and scaled) and settings.tensors is not None:
        tied = "lm_head.weight" not in settings.tensors
    return tied, scaled


def _mlp(settings: Settings) -> MLP | GatedMLP:
    """`gated-X` or `X`; the derived keys that newer files have beside it go before it."""
    projection = settings.take("feed_forward_proj", "relu")
    gated = settings.take("is_gated_act", projection.startswith("gated-"))
    name = "gelu_new" if projection == "gated-gelu" else projection.removeprefix("gated-")
    name = settings.take("dense_act_fn", name)
    if name not in ACTIVATIONS:
        settings.refuse(f"feed_forward_proj={projection!r} (valid: gated- and {', '.join(ACTIVATIONS)})")
        name = "relu"
    kind = GatedMLP if gated else MLP
    return kind(settings.take("d_ff", 2048), ACTIVATIONS[name], bias=False)


def write(config: TransformerConfig, architecture: str) -> dict[str, Any]:
    """The keys of config.json that make `config`."""
    positions, attention = choice(config, "positions", RelativeBuckets), config.attention
    mlp = config.mlp if isinstance(config.mlp, MLP) else choice(config, "mlp", GatedMLP)
    return {
        "num_layers": config.layers,
        "num_decoder_layers": config.depth_of_decoder,
        "d_model": config.width,
        "vocab_size": config.vocab,
        "num_heads": attention.heads,
        "d_kv": attention.width_of_head(config.width),
        "d_ff": config.mlp.width or 4 * config.width,
        "feed_forward_proj": _projection(mlp),
        "layer_norm_epsilon": choice(config, "norm", RMSNorm).epsilon,
        "relative_attention_num_buckets": positions.buckets,
        "relative_attention_max_distance": positions.max_distance,
        "tie_word_embeddings": config.tied,
        "scale_decoder_outputs": config.logit_scale != 1.0,
        "dropout_rate": config.dropout,
        "is_encoder_decoder": config.kind == "encoder-decoder",
    }


def _projection(mlp: MLP | GatedMLP) -> str:
    if isinstance(mlp, MLP):
        return their_activation(mlp.activation)
    if mlp.activation == "gelu":
        raise InputError("a gated mlp with activation='gelu' cannot be written as a T5; 'gelu_tanh' can")
    name = "gelu" if mlp.activation == "gelu_tanh" else their_activation(mlp.activation)
    return f"gated-{name}"


def entries(config: TransformerConfig, head: Head | None) -> Iterator[Entry]:
    """Every tensor of a T5 with this head."""
    both = config.kind == "encoder-decoder"
    stacks = ("encoder", "decoder") if both else ("encoder",)
    again = [f"{stack}.embed_tokens.weight" for stack in stacks]
    words = Rows(0, config.vocab)
    also = (*again, "lm_head.weight") if config.tied and both else tuple(again)
    yield Entry("shared.weight", "embedding/table", words, also)
    yield from _stack(config, "encoder", "encoder/" if both else "", config.layers)
    if both:
        yield from _stack(config, "decoder", "decoder/", config.depth_of_decoder)
    if isinstance(head, LanguageModelHead) and not config.tied:
        yield Entry("lm_head.weight", "head/kernel", Rows(0, config.vocab, 1, Transposed()))


def _stack(config: TransformerConfig, theirs: str, ours: str, depth: int) -> Iterator[Entry]:
    """The tensors of one stack; its first layer holds the relative positions of all."""
    table = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    yield Entry(table, f"{ours}relative_bias/table")
    yield from norm(f"{theirs}.final_layer_norm", f"{ours}final_norm", bias=False)
    for index in range(depth):
        block, layer = f"{theirs}.block.{index}.layer", f"{ours}layers_{index}"
        yield from _attention(f"{block}.0.SelfAttention", f"{layer}/attention")
        yield from norm(f"{block}.0.layer_norm", f"{layer}/attention_norm", bias=False)
        if theirs == "decoder":
            yield from _attention(f"{block}.1.EncDecAttention", f"{layer}/cross_attention")
            yield from norm(f"{block}.1.layer_norm", f"{layer}/cross_attention_norm", bias=False)
        last = 2 if theirs == "decoder" else 1
        yield from norm(f"{block}.{last}.layer_norm", f"{layer}/mlp_norm", bias=False)
        names = {"wi_0": "gate", "wi_1": "up"} if isinstance(config.mlp, GatedMLP) else {"wi": "up"}
        for name, own in {**names, "wo": "down"}.items():
            yield from linear(f"{block}.{last}.DenseReluDense.{name}", f"{layer}/mlp/{own}", bias=False)


def encoder_of(model: Transformer, params: Params) -> tuple[Transformer, Params]:
    """The encoder of an encoder-decoder, as a model of its own that ends in hidden states `[B, T, D]`.

    The parameters are the same arrays. Raises `InputError` for a model of another kind.
    """
    if model.config.kind != "encoder-decoder":
        raise InputError(f"encoder_of needs an encoder-decoder, not a {model.config.kind}")
    config = replace(model.config, kind="encoder", decoder_layers=0, tied=True)
    return Transformer(config, None), {"embedding": params["embedding"], **params["encoder"]}


def _attention(theirs: str, ours: str) -> Iterator[Entry]:
    for name in ("query", "key", "value", "output"):
        yield from linear(f"{theirs}.{name[0]}", f"{ours}/{name}", bias=False)


FAMILIES = (
    Family(
        name="t5",
        architectures={
            "T5ForConditionalGeneration": lambda settings: LanguageModelHead(),
            "T5Model": lambda settings: None,
            ENCODER: lambda settings: None,
        },
        read=read,
        write=write,
        entries=entries,
        buffers=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    ),
)
