"""Published training runs: their models' shapes, machines, batches, and the speed that was reported.

`figure` is what was read, with its source. Meshes and batches marked remembered were not read again; a run
without a mesh is planned with the best one found. The shapes were remembered too; that their parameter
counts agree with the counts that were read (`parameters`) is a test.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...models.attention import GroupedQuery, multi_head, multi_query
from ...models.config import TransformerConfig
from ...models.mlp import MLP, GatedMLP
from ...models.norms import LayerNorm, RMSNorm
from ...models.positions import Learned, Positions, Rotary
from ...models.presets import preset


@dataclass(frozen=True)
class Run:
    """One published run.

    figure    model FLOPs utilisation as reported, 0 to 1;  convention: "6N" leaves attention's products out
              of it, "whole" counts all scores, "causal" half of them
    steady    whether it is of a step, not of the whole run with its interruptions
    mesh      "" where not known;  micro: micro-batches, 0 where not known
    remat     policies that were used, or all where not known
    flash, chunked, sequence, recipe, interleave  what was used where known, else assumed as for its framework
    """

    name: str
    config: TransformerConfig
    parameters: float
    chip: str
    topology: str
    batch: int
    length: int
    figure: float
    source: str
    convention: str = "6N"
    steady: bool = True
    mesh: str = ""
    micro: int = 0
    remat: tuple[str, ...] = ("none", "dots", "full")
    flash: bool = True
    sequence: bool = True
    axes: tuple[str, ...] = ("data", "fsdp", "tensor")
    recipe: str = "mixed"
    chunked: bool = False
    interleave: int = 1


def llama(
    layers: int, width: int, heads: int, kv_heads: int, hidden: int, vocab: int = 32_000
) -> TransformerConfig:
    """RMSNorm, rotary positions, SwiGLU without biases, an untied head."""
    return TransformerConfig(
        layers=layers,
        width=width,
        vocab=vocab,
        attention=GroupedQuery(heads, kv_heads, bias=False),
        mlp=GatedMLP(hidden, "silu"),
        norm=RMSNorm(),
        positions=Rotary(),
        tied=False,
    )


def palm() -> TransformerConfig:
    """PaLM 540B: 118 layers of 18432, 48 heads of 256 with one key/value head, SwiGLU, a shared table."""
    return TransformerConfig(
        layers=118,
        width=18_432,
        vocab=256_000,
        attention=multi_query(48, head_width=256, bias=False),
        mlp=GatedMLP(4 * 18_432, "silu"),
        positions=Rotary(),
    )


def bloom() -> TransformerConfig:
    """BLOOM 176B: 70 layers of 14336, 112 heads, no table of positions."""
    return TransformerConfig(
        layers=70,
        width=14_336,
        vocab=250_880,
        attention=multi_head(112),
        mlp=MLP(4 * 14_336, "gelu_tanh"),
        norm=LayerNorm(1e-5),
        positions=Positions(),
        embedding_norm=True,
    )


def megatron_530b() -> TransformerConfig:
    """Megatron-Turing NLG: GPT-3's design with 105 layers of 20480 and 128 heads."""
    return replace(
        preset("gpt3-175b"),
        layers=105,
        width=20_480,
        attention=multi_head(128),
        mlp=MLP(4 * 20_480, "gelu_tanh"),
        positions=Learned(2048),
    )


LLAMA2_70B = llama(80, 8192, 64, 8, 28_672)
LLAMA3_70B = llama(80, 8192, 64, 8, 28_672, 128_256)
LLAMA3_8B = llama(32, 4096, 32, 8, 14_336, 128_256)
LLAMA3_405B = llama(126, 16_384, 128, 8, 53_248, 128_256)
LLAMA_65B = llama(80, 8192, 64, 64, 22_016)
PIPED = ("data", "fsdp", "tensor", "pipe")
MEGATRON = {"flash": False, "axes": PIPED, "remat": ("full",), "sequence": False}
MAXTEXT = "AI-Hypercomputer/maxtext tiering.md (jaxstyle.md 4)"

RUNS = (
    Run(
        *("MT-NLG 530B", megatron_530b(), 530e9, "a100-80", "280x8", 1920, 2048, 0.2977),
        "60.1 s a step of 1920 x 2048 on 2240 A100 (apps.md 5.2); mesh remembered",
        mesh="data=8,tensor=8,pipe=35",
        micro=240,
        **MEGATRON,  # type: ignore[arg-type]
    ),
    Run(
        *("BLOOM 176B, best", bloom(), 176.247e9, "a100-80", "48x8", 2048, 2048, 156 / 312 * 0.75),
        "156 TFLOP/s with recomputation, taken as 3/4 model FLOPs (apps.md 5.2); mesh remembered",
        mesh="data=8,tensor=4,pipe=12",
        micro=128,
        convention="whole",
        **MEGATRON,  # type: ignore[arg-type]
    ),
    Run(
        *("GPT-3 175B", preset("gpt3-175b"), 175e9, "v100", "128x8", 1536, 2048, 0.213),
        "21.3% in the PaLM paper; chips and mesh are not published: planned on 1024 V100; batch remembered",
        **{**MEGATRON, "axes": PIPED},  # type: ignore[arg-type]
    ),
    Run(
        *("PaLM 540B", palm(), 540.35e9, "v4", "12x16x16", 1024, 2048, 0.462),
        "46.2% with attention (apps.md 5.2) on 6144 v4, planned as one of its two pods; mesh remembered",
        convention="whole",
        mesh="fsdp=256,tensor=12",
        remat=("full", "dots"),
    ),
    Run(
        *("LLaMA 65B", LLAMA_65B, 65.2e9, "a100-80", "256x8", 2048, 2048, 380 * 6 * 65.2e9 / 312e12),
        "380 tokens/s a GPU on 2048 A100 (apps.md 5.2); batch of 4M tokens remembered",
    ),
    Run(
        *("Llama 3.1 405B, 8K GPUs", LLAMA3_405B, 405.85e9, "h100", "1024x8", 2048, 8192, 0.43),
        "43%, the upper end of 38-43% a stage (apps.md 5.2); batch and mesh remembered",
        mesh="data=64,tensor=8,pipe=16",
        micro=32,
        interleave=8,
        convention="causal",
        axes=PIPED,
        chunked=True,
    ),
    Run(
        *("MaxText Llama 2 70B", LLAMA2_70B, 68.98e9, "v5p", "8x8x8", 2048, 4096, 0.654),
        f"65.4%, 692 tokens/s a chip, {MAXTEXT}; batch assumed",
        convention="whole",
        chunked=True,
    ),
    Run(
        *("MaxText Llama 3.1 70B", LLAMA3_70B, 70.55e9, "v6e", "16x16", 512, 8192, 0.5033),
        f"50.33%, 960 tokens/s a chip, {MAXTEXT}; batch assumed",
        convention="whole",
        chunked=True,
    ),
    Run(
        *("MaxText Llama 3.1 8B", LLAMA3_8B, 8.03e9, "v6e", "16x16", 512, 8192, 0.4546),
        f"45.46%, 7207 tokens/s a chip, {MAXTEXT}; batch assumed",
        convention="whole",
        chunked=True,
    ),
    Run(
        *("MaxText Llama 3.1 405B", LLAMA3_405B, 405.85e9, "v6e", "16x16", 256, 8192, 0.3855),
        f"38.55%, 123 tokens/s a chip, {MAXTEXT}; batch assumed, 12 bytes a parameter (it does not fit "
        f"with 16)",
        recipe="lean",
        convention="whole",
        chunked=True,
    ),
    Run(
        *("MaxText Llama 2 70B", LLAMA2_70B, 68.98e9, "v6e", "16x16", 512, 4096, 0.438),
        f"43.8%, {MAXTEXT}; batch assumed",
        convention="whole",
        chunked=True,
    ),
    Run(
        *("MaxText Llama 3 70B", LLAMA3_70B, 70.55e9, "h100", "16x8", 256, 8192, 506.6 / 989),
        "506.6 TFLOP/s, 1052 tokens/s a GPU, NVIDIA dgxc-benchmarking 25.02 (jaxstyle.md 4); batch assumed",
        convention="whole",
        chunked=True,
    ),
)
