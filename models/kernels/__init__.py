"""Attention and other kernels written by hand: one front, one reference, one file a backend.

`front` has `attention()`; `masks` and `biases` are the expressions it takes. `registry` chooses the
implementation of a `request`: `reference` (every score at once, the oracle). `spans` and `trees` hold what
these share: ranges of indices, and dataclasses that are pytrees.
"""

from .biases import ALiBi, Bias, Bucketed, alibi_slopes
from .biases import Dense as DenseBias
from .front import attention, attention_probabilities
from .masks import And, Causal, Dense, Full, Lengths, Mask, Not, Or, Prefix, Segments, Window
from .registry import implementations
from .request import Implementation, Request

__all__ = [
    "ALiBi",
    "And",
    "Bias",
    "Bucketed",
    "Causal",
    "Dense",
    "DenseBias",
    "Full",
    "Implementation",
    "Lengths",
    "Mask",
    "Not",
    "Or",
    "Prefix",
    "Request",
    "Segments",
    "Window",
    "alibi_slopes",
    "attention",
    "attention_probabilities",
    "implementations",
]
