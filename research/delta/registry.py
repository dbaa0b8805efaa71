"""The methods by the names that delta files store."""

from __future__ import annotations

from collections.abc import Mapping

from .adapter import Adapter
from .bitfit import BitFit
from .diff_pruning import DiffPruning
from .full import Full
from .ia3 import IA3
from .intrinsic import SAID
from .layer_norm import LayerNormTuning
from .lora import LoRA
from .low_rank_adapter import LowRankAdapter
from .methods import Method
from .parallel_adapter import ParallelAdapter
from .random_subset import RandomSubset, SparseOffset

METHODS: Mapping[str, type[Method]] = {
    each.name: each
    for each in (
        LoRA,
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
    )
}
