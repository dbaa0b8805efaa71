"""Configurations by name. Sizes are those of the cited papers; `parameter_count` is tested."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from typing import Any

from .. import InputError
from .attention import GroupedQuery, multi_head
from .config import TransformerConfig
from .experts import RoutedMLP
from .mlp import MLP, GatedMLP
from .norms import LayerNorm, RMSNorm
from .positions import Learned, Rotary, Sinusoidal
from .relations import SegmentRelations, TreeRelations
from .residuals import NormedResidual, PostNorm, PreNorm
from .rotary2d import Rotary2D

Preset = Callable[[], TransformerConfig]


def original_transformer(layers: int, width: int, heads: int) -> TransformerConfig:
    """Vaswani et al., "Attention Is All You Need" (2017), table 3; one shared vocabulary of 37,000."""
    return TransformerConfig(
        kind="encoder-decoder",
        layers=layers,
        width=width,
        vocab=37_000,
        attention=multi_head(heads, bias=False),
        mlp=MLP(4 * width, "relu"),
        positions=Sinusoidal(),
        residual=PostNorm(),
        embedding_scale=0.0,
        dropout=0.1,
    )


def gpt1() -> TransformerConfig:
    """Radford et al., "Improving Language Understanding by Generative Pre-Training" (2018)."""
    return TransformerConfig(
        layers=12,
        width=768,
        vocab=40_478,
        attention=multi_head(12),
        mlp=MLP(4 * 768, "gelu_tanh"),
        positions=Learned(512),
        residual=PostNorm(),
        dropout=0.1,
    )


def gpt2(layers: int, width: int, heads: int) -> TransformerConfig:
    """Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), table 2."""
    return TransformerConfig(
        layers=layers,
        width=width,
        vocab=50_257,
        attention=multi_head(heads),
        mlp=MLP(4 * width, "gelu_tanh"),
        norm=LayerNorm(1e-5),
        positions=Learned(1024),
        dropout=0.1,
    )


def gpt3(layers: int, width: int, heads: int) -> TransformerConfig:
    """Brown et al., "Language Models are Few-Shot Learners" (2020), table 2.1.

    All layers are dense here; the paper alternates dense and locally banded sparse attention, which
    changes no parameter.
    """
    return replace(gpt2(layers, width, heads), positions=Learned(2048), dropout=0.0, scan=True)


def ladder(layers: int, width: int) -> TransformerConfig:
    """A rung of the talk's ladder of sizes: GPT-3's shape with heads of 64 (width 1024) or 128."""
    return gpt3(layers, width, width // (64 if width <= 1024 else 128))


def quick() -> TransformerConfig:
    """The quickstart's decoder: ReLU, so neurons can be exactly silent; small enough for a laptop."""
    return TransformerConfig(
        layers=4,
        width=128,
        vocab=2048,
        attention=multi_head(4),
        mlp=MLP(512, "relu"),
        positions=Learned(128),
    )


def modern(layers: int, width: int, heads: int, kv_heads: int, vocab: int = 32_000) -> TransformerConfig:
    """RMSNorm, rotary positions, grouped queries and SwiGLU (Touvron et al., "LLaMA", 2023)."""
    return TransformerConfig(
        layers=layers,
        width=width,
        vocab=vocab,
        attention=GroupedQuery(heads, kv_heads, bias=False),
        mlp=GatedMLP(-(-8 * width // 3 // 64) * 64, "silu"),
        norm=RMSNorm(),
        positions=Rotary(),
        tied=False,
    )


def routed(
    layers: int, width: int, heads: int, kv_heads: int, mlp: RoutedMLP, vocab: int = 32_000
) -> TransformerConfig:
    """`modern` with routed experts for its mlp, scanned."""
    return replace(modern(layers, width, heads, kv_heads, vocab), mlp=mlp, scan=True)


def mixtral() -> TransformerConfig:
    """Jiang et al., "Mixtral of Experts" (2024), table 1: 46.7B parameters, 12.9B of them active."""
    config = routed(32, 4096, 32, 8, RoutedMLP(8, 2, 14_336))
    return replace(config, norm=RMSNorm(1e-5), positions=Rotary(1_000_000.0))


def cpm(**choices: Any) -> TransformerConfig:
    """What CPM-Ant and CPM-Bee share (OpenBMB, `cpm-ant-10b.json` and `cpm-bee-10b.json`)."""
    return TransformerConfig(
        layers=48,
        width=4096,
        attention=multi_head(32, head_width=128, bias=False),
        mlp=GatedMLP(10_240, "gelu"),
        norm=RMSNorm(1e-6),
        embedding_scale=1 / 64,
        logit_scale=1 / 64,
        scaled_linears=True,
        **choices,
    )


def cpm_ant() -> TransformerConfig:
    """CPM-Ant, with prompts of 32 tokens for 32 tasks as further rows of the table."""
    return cpm(vocab=30_720, input_rows=32 * 32, positions=SegmentRelations(scale=1 / 64))


def cpm_bee() -> TransformerConfig:
    """CPM-Bee; its head is `ExtendedHead`."""
    return cpm(vocab=86_583, positions=TreeRelations(), residual=PreNorm(divisor=1.05))


def chatglm() -> TransformerConfig:
    """ChatGLM-6B (THUDM, `modeling_chatglm.py`), with its head tied to the table."""
    return TransformerConfig(
        layers=28,
        width=4096,
        vocab=130_528,
        attention=multi_head(32),
        mlp=MLP(16_384, "gelu_tanh"),
        positions=Rotary2D(),
        residual=NormedResidual(sqrt(2 * 28)),
    )


PRESETS: dict[str, Preset] = {
    "transformer-base": lambda: original_transformer(6, 512, 8),
    "transformer-big": lambda: original_transformer(6, 1024, 16),
    "gpt1": gpt1,
    "gpt2": lambda: gpt2(12, 768, 12),
    "gpt2-medium": lambda: gpt2(24, 1024, 16),
    "gpt2-large": lambda: gpt2(36, 1280, 20),
    "gpt2-xl": lambda: gpt2(48, 1600, 25),
    "gpt3-175b": lambda: gpt3(96, 12_288, 96),
    "ladder-0.3b": lambda: ladder(24, 1024),
    "ladder-1b": lambda: ladder(24, 2048),
    "ladder-3b": lambda: ladder(36, 2560),
    "ladder-7b": lambda: ladder(36, 4096),
    "ladder-10b": lambda: ladder(48, 4096),
    "ladder-20b": lambda: ladder(60, 5120),
    "ladder-25b": lambda: ladder(72, 5120),
    "ladder-60b": lambda: ladder(72, 8192),
    "ladder-175b": lambda: ladder(96, 12_288),
    "cpm-ant-10b": cpm_ant,
    "cpm-bee-10b": cpm_bee,
    "chatglm-6b": chatglm,
    "quick": quick,
    "modern-tiny": lambda: modern(4, 256, 8, 2, 4096),
    "routed-tiny": lambda: routed(4, 256, 8, 2, RoutedMLP(8, 2, 256), 4096),
    "mixtral-8x7b": mixtral,
}


def preset(name: str) -> TransformerConfig:
    """The configuration called `name`; raises `InputError` with near misses for an unknown name."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 3) or sorted(PRESETS)
        raise InputError(f"preset {name!r} is unknown; did you mean {', '.join(near)}?")
    return PRESETS[name]()
