"""Plans and costs of configurations: joins the models to `modicum.parallel.plan`.

tables.py     the table of layers of a configuration
training.py   utilisation, days, dollars, energy
serving.py    prefill and decoding, caches, dollars a million tokens
published.py  published runs to validate on
validation.py predicted beside published
report.py     a plan as text
"""

from .serving import Serving, cache_bytes_per_token, electricity_dollars, serving_of
from .tables import count_parameters, layer_table
from .training import (
    TrainingCost,
    tokens_per_second,
    training_days,
    training_flops,
    utilisation,
)

__all__ = [
    "Serving",
    "TrainingCost",
    "cache_bytes_per_token",
    "count_parameters",
    "electricity_dollars",
    "layer_table",
    "serving_of",
    "tokens_per_second",
    "training_days",
    "training_flops",
    "utilisation",
]
