"""Activation sparsity: measuring which neurons fire, and computing only those that are expected to.

Rooms: `statistics` (counts per layer, neuron and pair, streamed), `coactivation` (what pairs say), `mass`
(how activation mass is spread), `survey` (counts and mass in one pass), `layers` (values of scanned layers
one by one), `storage` (statistics in a file), `thresholds` (training-free).
Conversion to experts: `moefication` joins `feed_forward` (layers taken out of a model, and what they read),
`partitions` (constructions, by `balanced` k-means or `graph` partition), `routing` (routers) and `quality`
(what a choice keeps). `relufication` changes the activation function and trains on, a body without a head by
`hidden_distillation`.
"""

from .coactivation import coactivation_rows, correlation
from .mass import LayerMass, mass_rows, measure_mass
from .moefication import Moefication, Moefied, moefy
from .partitions import Clusters, CoActivation, Contiguous, Shuffled
from .routing import Fitting
from .statistics import (
    ActivationStatistics,
    Counter,
    LayerStatistics,
    measure,
    real_tokens,
    transformer_inputs,
)
from .storage import load_statistics, save_statistics
from .survey import Survey, Surveyed
from .thresholds import Thresholds, find_thresholds

__all__ = [
    "ActivationStatistics",
    "Clusters",
    "CoActivation",
    "Contiguous",
    "Counter",
    "Fitting",
    "LayerMass",
    "LayerStatistics",
    "Moefication",
    "Moefied",
    "Shuffled",
    "Survey",
    "Surveyed",
    "Thresholds",
    "coactivation_rows",
    "correlation",
    "find_thresholds",
    "load_statistics",
    "mass_rows",
    "measure",
    "measure_mass",
    "moefy",
    "real_tokens",
    "save_statistics",
    "transformer_inputs",
]
