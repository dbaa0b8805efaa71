"""The methods by the names that delta files store."""

from __future__ import annotations

from collections.abc import Mapping

from .adalora import AdaLoRA
from .adapter import Adapter
from .bitfit import BitFit
from .compacter import Compacter
from .diff_pruning import DiffPruning
from .dora import DoRA
from .flax_prefix import FlaxPrefix
from .full import Full
from .ia3 import IA3
from .intrinsic import SAID
from .layer_norm import LayerNormTuning
from .lora import LoRA
from .low_rank_adapter import LowRankAdapter
from .methods import Method
from .oft import OFT
from .parallel_adapter import ParallelAdapter
from .prefix import Prefix
from .prompt_encoder import PromptEncoder
from .random_subset import RandomSubset, SparseOffset
from .shift_positions import ShiftPositions
from .soft_prompt import SoftPrompt
from .vera import VeRA

METHODS: Mapping[str, type[Method]] = {
    each.name: each
    for each in (
        LoRA,
        DoRA,
        AdaLoRA,
        VeRA,
        OFT,
        Adapter,
        BitFit,
        Full,
        LayerNormTuning,
        RandomSubset,
        SparseOffset,
        DiffPruning,
        SAID,
        IA3,
        ParallelAdapter,
        LowRankAdapter,
        Prefix,
        FlaxPrefix,
        ShiftPositions,
        SoftPrompt,
        PromptEncoder,
        Compacter,
    )
}
