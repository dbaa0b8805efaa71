"""GPT-2 (Radford et al., 2019): `GPT2LMHeadModel` and `GPT2Model` of `transformers`.

Their `Conv1D.weight` is `[in, out]`, as our kernels are; queries, keys and values are one tensor. Files of
the hub lack the beginning `transformer.` although their architecture has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .. import (
    MLP,
    GroupedQuery,
    LanguageModelHead,
    Layer,
    LayerNorm,
    Learned,
    TransformerConfig,
)
from ..heads import Head
from .family import Family, activation, choice, their_activation
from .mapping import Entry, Part, Rows, Transposed, norm
from .settings import Settings


def read(settings: Settings) -> TransformerConfig:
    """The configuration of a GPT-2; our one `dropout` takes the residual branches' (training only)."""
    take = settings.take
    width, heads, layers = take("n_embd", 768), take("n_head", 12), take("n_layer", 12)
    scaled = take("scale_attn_weights", True)
    by_layer = take("scale_attn_by_inverse_layer_idx", False)
    # The same mathematics in another order; the rest is dropout and the double-heads model's.
    settings.ignore("reorder_and_upcast_attn", "embd_pdrop", "attn_pdrop", "n_ctx")
    settings.ignore(*(key for key in settings.values if key.startswith("summary_")))
    attention = GroupedQuery(heads, heads, scale=0.0 if scaled else 1.0)
    return TransformerConfig(
        layers=layers,
        width=width,
        vocab=take("vocab_size", 50_257),
        attention=attention,
        mlp=MLP(take("n_inner", None) or 4 * width, activation(settings, "activation_function", "gelu_new")),
        norm=LayerNorm(float(take("layer_norm_epsilon", 1e-5))),
        positions=Learned(take("n_positions", 1024)),
        pattern=_divided(attention, width, layers) if by_layer else (),
        tied=take("tie_word_embeddings", True),
        dropout=float(take("resid_pdrop", 0.1)),
        initial_std=float(take("initializer_range", 0.02)),
    )


def _divided(attention: GroupedQuery, width: int, layers: int) -> tuple[Layer, ...]:
    """Layers whose scores are divided by 1, 2, 3, ... (`scale_attn_by_inverse_layer_idx`)."""
    scale = attention.scale or attention.width_of_head(width) ** -0.5
    return tuple(Layer(attention=replace(attention, scale=scale / (index + 1))) for index in range(layers))


def write(config: TransformerConfig, architecture: str) -> dict[str, Any]:
    """The keys of config.json."""
    attention, mlp = choice(config, "attention", GroupedQuery), choice(config, "mlp", MLP)
    return {
        "vocab_size": config.vocab,
        "n_positions": choice(config, "positions", Learned).max_length,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": attention.heads,
        "n_inner": mlp.width or 4 * config.width,
        "activation_function": their_activation(mlp.activation),
        "layer_norm_epsilon": choice(config, "norm", LayerNorm).epsilon,
        "scale_attn_weights": attention.scale == 0.0,
        "scale_attn_by_inverse_layer_idx": bool(config.pattern),
        "add_cross_attention": False,
        "tie_word_embeddings": config.tied,
        "resid_pdrop": config.dropout,
        "initializer_range": config.initial_std,
    }


def entries(config: TransformerConfig, head: Head | None) -> Iterator[Entry]:
    """The tensors of `GPT2LMHeadModel`."""
    tied = config.tied
    words = Rows(0, config.vocab)
    yield Entry("transformer.wte.weight", "embedding/table", words, ("lm_head.weight",) if tied else ())
    yield Entry("transformer.wpe.weight", "position_embedding/table")
    for index in range(config.layers):
        yield from _layer(f"transformer.h.{index}", f"layers_{index}")
    yield from norm("transformer.ln_f", "final_norm")
    if isinstance(head, LanguageModelHead) and not tied:
        yield Entry("lm_head.weight", "head/kernel", Rows(0, config.vocab, 1, Transposed()))


def _layer(theirs: str, ours: str) -> Iterator[Entry]:
    yield from norm(f"{theirs}.ln_1", f"{ours}/attention_norm")
    yield from norm(f"{theirs}.ln_2", f"{ours}/mlp_norm")
    for index, name in enumerate(("query", "key", "value")):
        yield Entry(f"{theirs}.attn.c_attn.weight", f"{ours}/attention/{name}/kernel", Part(index, 3, 1))
        yield Entry(f"{theirs}.attn.c_attn.bias", f"{ours}/attention/{name}/bias", Part(index, 3))
    dense = (("attn.c_proj", "attention/output"), ("mlp.c_fc", "mlp/up"), ("mlp.c_proj", "mlp/down"))
    for their_name, our_name in dense:
        yield Entry(f"{theirs}.{their_name}.weight", f"{ours}/{our_name}/kernel")
        yield Entry(f"{theirs}.{their_name}.bias", f"{ours}/{our_name}/bias")


FAMILIES = (
    Family(
        name="gpt2",
        architectures={"GPT2LMHeadModel": lambda settings: LanguageModelHead(), "GPT2Model": lambda _: None},
        read=read,
        write=write,
        entries=entries,
        prefixes=("transformer.",),
        bare=("GPT2Model",),
        buffers=(r"h\.\d+\.attn\.(bias|masked_bias)$",),
    ),
)
