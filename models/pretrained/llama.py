"""LLaMA (Touvron et al., 2023) and those that differ from it in options: Mistral, Qwen2 and Qwen3.

RMSNorm, rotary positions, grouped queries, a gated mlp. What differs: Qwen2 has biases on queries, keys and
values, Qwen3 norms on queries and keys, Mistral a window on all layers, Qwen a window on some.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .. import (
    GatedMLP,
    GroupedQuery,
    LanguageModelHead,
    Layer,
    RMSNorm,
    Rotary,
    TransformerConfig,
)
from ..heads import Head
from .family import Family, activation, choice, their_activation
from .mapping import Entry, Rows, Transposed, linear, norm
from .rope import read_rope, write_rope
from .settings import Settings

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Kind:
    """What a kind's configuration class has where config.json is silent, and which options it reads.

    `windows` and `write_windows` read and write the window of every layer (0: none), `width` is the mlp's,
    `head_width` and `kv_heads` 0 are those of plain heads. `bias` and `output_bias` None: as
    `attention_bias` says; `mlp_bias` None: as its key says.
    """

    name: str
    windows: Callable[[Settings, int], tuple[int, ...]]
    write_windows: Callable[[tuple[int, ...]], dict[str, Any]]
    vocab: int = 32_000
    width: int = 11_008
    kv_heads: int = 0
    head_width: int = 0
    length: int = 2048
    bias: bool | None = False
    output_bias: bool | None = False
    mlp_bias: bool | None = False
    query_key_norm: bool = False


def no_windows(settings: Settings, layers: int) -> tuple[int, ...]:
    """LLaMA's layers see everything before them."""
    return (0,) * layers


def one_window(settings: Settings, layers: int) -> tuple[int, ...]:
    """Mistral's layers have the same window, or (null) none."""
    return (settings.take("sliding_window", 4096) or 0,) * layers


def some_windows(settings: Settings, layers: int) -> tuple[int, ...]:
    """Qwen's layers have a window where `layer_types` says so, or from `max_window_layers` on."""
    window, first = settings.take("sliding_window", 4096), settings.take("max_window_layers", 28)
    used = settings.take("use_sliding_window", False) and window is not None
    derived = [SLIDING if used and index >= first else FULL for index in range(layers)]
    types = settings.take("layer_types", None) or derived
    valid = (FULL, SLIDING) if used else (FULL,)
    if len(types) != layers or not set(types) <= set(valid):
        settings.refuse(f"layer_types={types!r} (valid: {layers} of {', '.join(valid)})")
        return (0,) * layers
    return tuple(window if kind == SLIDING else 0 for kind in types)


def write_one_window(windows: tuple[int, ...]) -> dict[str, Any]:
    """Mistral's key."""
    return {"sliding_window": windows[0] or None}


def write_some_windows(windows: tuple[int, ...]) -> dict[str, Any]:
    """Qwen's keys."""
    largest = max(windows)
    return {
        "use_sliding_window": largest > 0,
        "sliding_window": largest or None,
        "max_window_layers": next((i for i, window in enumerate(windows) if window), len(windows)),
        "layer_types": [SLIDING if window else FULL for window in windows],
    }


def read(kind: Kind, settings: Settings) -> TransformerConfig:
    """The configuration of a model of this kind."""
    take = settings.take
    width, heads, layers = (
        take("hidden_size", 4096),
        take("num_attention_heads", 32),
        take("num_hidden_layers", 32),
    )
    settings.ignore("attention_dropout", "pretraining_tp")
    length = take("max_position_embeddings", kind.length)
    bias = take("attention_bias", False) if kind.bias is None else kind.bias
    mlp_bias = take("mlp_bias", False) if kind.mlp_bias is None else kind.mlp_bias
    attention = GroupedQuery(
        heads,
        take("num_key_value_heads", kind.kv_heads) or heads,
        take("head_dim", kind.head_width) or 0,
        bias=bias,
        output_bias=bias if kind.output_bias is None else kind.output_bias,
        query_key_norm=kind.query_key_norm,
    )
    windows = kind.windows(settings, layers)
    return TransformerConfig(
        layers=layers,
        width=width,
        vocab=take("vocab_size", kind.vocab),
        attention=replace(attention, window=windows[0] if len(set(windows)) == 1 else 0),
        mlp=GatedMLP(
            take("intermediate_size", kind.width), activation(settings, "hidden_act", "silu"), mlp_bias
        ),
        norm=RMSNorm(float(take("rms_norm_eps", 1e-6))),
        positions=read_rope(settings, length),
        pattern=_pattern(attention, windows),
        tied=take("tie_word_embeddings", False),
        initial_std=float(take("initializer_range", 0.02)),
    )


def _pattern(attention: GroupedQuery, windows: tuple[int, ...]) -> tuple[Layer, ...]:
    """The shortest pattern of layers with these windows; none where all are alike."""
    count = len(windows)
    period = next(p for p in range(1, count + 1) if count % p == 0 and windows[:p] * (count // p) == windows)
    return tuple(Layer(replace(attention, window=w)) for w in windows[:period]) if period > 1 else ()


def write(kind: Kind, config: TransformerConfig, architecture: str) -> dict[str, Any]:
    """The keys of config.json."""
    attention, mlp = choice(config, "attention", GroupedQuery), choice(config, "mlp", GatedMLP)
    windows = tuple(config.layer(index)[0].window for index in range(config.layers))
    keys = {
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "intermediate_size": mlp.width or 4 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.groups,
        "head_dim": attention.width_of_head(config.width),
        "hidden_act": their_activation(mlp.activation),
        "rms_norm_eps": choice(config, "norm", RMSNorm).epsilon,
        "tie_word_embeddings": config.tied,
        "initializer_range": config.initial_std,
        **write_rope(choice(config, "positions", Rotary)),
        **kind.write_windows(windows),
    }
    keys |= {"attention_bias": attention.bias} if kind.bias is None else {}
    return keys | ({"mlp_bias": mlp.bias} if kind.mlp_bias is None else {})


def entries(config: TransformerConfig, head: Head | None) -> Iterator[Entry]:
    """The tensors of the class with a language-model head."""
    tied = config.tied
    words = Rows(0, config.vocab)
    yield Entry("model.embed_tokens.weight", "embedding/table", words, ("lm_head.weight",) if tied else ())
    for index in range(config.layers):
        yield from _layer(config, index)
    yield from norm("model.norm", "final_norm", bias=False)
    if isinstance(head, LanguageModelHead) and not tied:
        yield Entry("lm_head.weight", "head/kernel", Rows(0, config.vocab, 1, Transposed()))


def _layer(config: TransformerConfig, index: int) -> Iterator[Entry]:
    theirs, ours = f"model.layers.{index}", f"layers_{index}"
    attention, mlp = config.layer(index)
    assert isinstance(mlp, GatedMLP)
    output_bias = attention.bias if attention.output_bias is None else attention.output_bias
    yield from norm(f"{theirs}.input_layernorm", f"{ours}/attention_norm", bias=False)
    yield from norm(f"{theirs}.post_attention_layernorm", f"{ours}/mlp_norm", bias=False)
    for short, name in (("q", "query"), ("k", "key"), ("v", "value")):
        yield from linear(f"{theirs}.self_attn.{short}_proj", f"{ours}/attention/{name}", attention.bias)
    yield from linear(f"{theirs}.self_attn.o_proj", f"{ours}/attention/output", output_bias)
    if attention.query_key_norm:
        yield from norm(f"{theirs}.self_attn.q_norm", f"{ours}/attention/query_norm", bias=False)
        yield from norm(f"{theirs}.self_attn.k_norm", f"{ours}/attention/key_norm", bias=False)
    for name in ("gate", "up", "down"):
        yield from linear(f"{theirs}.mlp.{name}_proj", f"{ours}/mlp/{name}", mlp.bias)


KINDS = {
    "Llama": Kind("llama", no_windows, lambda windows: {}, bias=None, output_bias=None, mlp_bias=None),
    "Mistral": Kind("mistral", one_window, write_one_window, width=14_336, kv_heads=8, length=131_072),
    "Qwen2": Kind(
        "qwen2",
        some_windows,
        write_some_windows,
        vocab=151_936,
        width=22_016,
        kv_heads=32,
        length=32_768,
        bias=True,
    ),
    "Qwen3": Kind(
        "qwen3",
        some_windows,
        write_some_windows,
        vocab=151_936,
        width=22_016,
        kv_heads=32,
        head_width=128,
        length=32_768,
        bias=None,
        output_bias=None,
        query_key_norm=True,
    ),
}


def _family(prefix: str, kind: Kind) -> Family:
    return Family(
        name=kind.name,
        architectures={
            f"{prefix}ForCausalLM": lambda settings: LanguageModelHead(),
            f"{prefix}Model": lambda settings: None,
        },
        read=partial(read, kind),
        write=partial(write, kind),
        entries=entries,
        prefixes=("model.",),
        bare=(f"{prefix}Model",),
        buffers=(r"rotary_emb\.inv_freq$",),
    )


FAMILIES = tuple(_family(prefix, kind) for prefix, kind in KINDS.items())
