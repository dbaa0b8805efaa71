"""OPT (Zhang et al., 2022): learned positions, ReLU, biases; the 350M model normalises after sublayers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ... import InputError
from .. import MLP, GroupedQuery, LayerNorm, Learned, PostNorm, PreNorm, TransformerConfig
from ..heads import Head, LanguageModelHead
from .family import Family, activation, choice, their_activation
from .mapping import Entry, Rows, Transposed, linear, norm
from .settings import Settings

OFFSET = 2  # rows at the beginning of the position table that no token takes


def read(settings: Settings) -> TransformerConfig:
    """The configuration of an OPT."""
    settings.require("layer_norm_elementwise_affine", True)
    settings.ignore("attention_dropout", "activation_dropout", "layerdrop")
    bias, width = settings.take("enable_bias", True), settings.take("hidden_size", 768)
    embedding = settings.take("word_embed_proj_dim", None) or width
    return TransformerConfig(
        kind="decoder",
        layers=settings.take("num_hidden_layers", 12),
        width=width,
        vocab=settings.take("vocab_size", 50_272),
        attention=GroupedQuery(settings.take("num_attention_heads", 12), bias=bias),
        mlp=MLP(settings.take("ffn_dim", 3072), activation(settings, "activation_function", "relu"), bias),
        norm=LayerNorm(1e-5),
        positions=Learned(settings.take("max_position_embeddings", 2048), OFFSET),
        residual=_residual(settings),
        tied=settings.take("tie_word_embeddings", True),
        embedding_width=0 if embedding == width else embedding,
        dropout=settings.take("dropout", 0.1),
        initial_std=settings.take("init_std", 0.02),
    )


def _residual(settings: Settings) -> PreNorm | PostNorm:
    removed = settings.take("_remove_final_layer_norm", False)
    before = settings.take("do_layer_norm_before", True)
    return PreNorm(final_norm=not removed) if before else PostNorm()


def write(config: TransformerConfig, architecture: str) -> dict[str, Any]:
    """The keys of config.json that make `config`."""
    mlp, residual = choice(config, "mlp", MLP), config.residual
    return {
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "vocab_size": config.vocab,
        "num_attention_heads": config.attention.heads,
        "enable_bias": config.attention.bias,
        "ffn_dim": mlp.width or 4 * config.width,
        "activation_function": their_activation(mlp.activation),
        "max_position_embeddings": choice(config, "positions", Learned).max_length,
        "do_layer_norm_before": isinstance(residual, PreNorm),
        "_remove_final_layer_norm": isinstance(residual, PreNorm) and not residual.final_norm,
        "word_embed_proj_dim": config.embedding_width or config.width,
        "tie_word_embeddings": config.tied,
        "dropout": config.dropout,
        "init_std": config.initial_std,
    }


def entries(config: TransformerConfig, head: Head | None) -> Iterator[Entry]:
    """Every tensor of an OPT with this head."""
    decoder, bias = "model.decoder", config.attention.bias
    also = ("lm_head.weight",) if config.tied else ()
    yield Entry(f"{decoder}.embed_tokens.weight", "embedding/table", Rows(0, config.vocab), also)
    yield Entry(f"{decoder}.embed_positions.weight", "position_embedding/table")
    if config.embedding_width:
        yield from linear(f"{decoder}.project_in", "embedding_projection", bias=False)
    for index in range(config.layers):
        theirs, ours = f"{decoder}.layers.{index}", f"layers_{index}"
        for name, own in {
            "q_proj": "query",
            "k_proj": "key",
            "v_proj": "value",
            "out_proj": "output",
        }.items():
            yield from linear(f"{theirs}.self_attn.{name}", f"{ours}/attention/{own}", bias)
        yield from norm(f"{theirs}.self_attn_layer_norm", f"{ours}/attention_norm")
        yield from linear(f"{theirs}.fc1", f"{ours}/mlp/up", bias)
        yield from linear(f"{theirs}.fc2", f"{ours}/mlp/down", bias)
        yield from norm(f"{theirs}.final_layer_norm", f"{ours}/mlp_norm")
    if config.residual.final_norm:
        yield from norm(f"{decoder}.final_layer_norm", "final_norm")
    if isinstance(head, LanguageModelHead):
        if config.embedding_width:
            yield from linear(f"{decoder}.project_out", "head/projection", bias=False)
        if not config.tied:
            yield Entry("lm_head.weight", "head/kernel", Rows(0, config.vocab, 1, Transposed()))


def _hidden(settings: Settings) -> None:
    """No head. In OPTModel the last projection is part of the body, here of the head."""
    inner, width = settings.take("word_embed_proj_dim", None), settings.take("hidden_size", 768)
    if inner and inner != width:
        raise InputError(
            f"OPTModel with word_embed_proj_dim={inner} and hidden_size={width} is not supported; "
            "load an OPTForCausalLM, with head=None for its hidden states before the last projection"
        )


FAMILIES = (
    Family(
        name="opt",
        architectures={"OPTForCausalLM": lambda settings: LanguageModelHead(), "OPTModel": _hidden},
        read=read,
        write=write,
        entries=entries,
        prefixes=("model.",),
        bare=("OPTModel",),
    ),
)
