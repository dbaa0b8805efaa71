"""Activation sparsity: measuring which neurons fire.

Rooms: `statistics` (counts per layer and neuron, streamed), `layers` (values of scanned layers one by
one), `storage` (statistics in a file).
"""

from .statistics import ActivationStatistics, LayerStatistics, measure, real_tokens, transformer_inputs
from .storage import load_statistics, save_statistics

__all__ = [
    "ActivationStatistics",
    "LayerStatistics",
    "load_statistics",
    "measure",
    "real_tokens",
    "save_statistics",
    "transformer_inputs",
]
