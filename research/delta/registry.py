"""The methods by the names that delta files store."""

from __future__ import annotations

from collections.abc import Mapping

from .adalora import AdaLoRA
from .adapter import Adapter
from .bitfit import BitFit
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
from .parallel_adapter import ParallelAdapter
from .prefix import Prefix
from .random_subset import RandomSubset, SparseOffset
from .shift_positions import ShiftPositions

METHODS: Mapping[str, type[Method]] = {
    each.name: each
    for each in (
        LoRA,
        DoRA,
        AdaLoRA,
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
    )
}
