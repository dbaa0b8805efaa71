"""Attention and other kernels written by hand: one front, one reference, one file a backend.

`front` has `attention()`; `masks`, `flags`, `biases`, `relations` and `dropout` are the expressions it takes,
`terms` joins them for the implementations, and `blocks` derives from a mask which tiles of the score matrix
are skipped. `registry` chooses the implementation of a `request`: `whole` (short sequences on CPUs),
`chunked` (XLA, tile by tile, of sizes from the table of `block_sizes`), `reference` (every score at once,
the oracle), Pallas kernels in `tpu` and `hopper`, by name `cudnn`.
`merging` joins attention on two sets of keys by their log-sum-exps, and `context` so attends to sequences
over a mesh axis; `sharded` computes on any mesh what XLA could not split, by the `letters` of arrays' axes;
`decode` is for few queries on a cache, `paged` for one that lies in pages.
`spans`, `trees` and `varying` hold what these share: ranges of indices, dataclasses that are pytrees, and
arrays inside `shard_map`.
"""

from ...parallel.zigzag import zigzag_order
from .biases import ALiBi, Bias, Bucketed, alibi_slopes
from .biases import Dense as DenseBias
from .context import context_attention
from .decode import Joined, decode_attention
from .dropout import Dropout
from .flags import Keys, Queries
from .front import attention, attention_probabilities
from .masks import And, Causal, Dense, Full, Lengths, Mask, Not, Or, Prefix, Segments, Window
from .merging import merge, merge_sinks
from .paged import Paged
from .registry import implementations
from .relations import Relations
from .request import Implementation, Request
from .sharded import MeshAxes, sharded_attention
from .terms import Terms

__all__ = [
    "ALiBi",
    "And",
    "Bias",
    "Bucketed",
    "Causal",
    "Dense",
    "DenseBias",
    "Dropout",
    "Full",
    "Implementation",
    "Joined",
    "Keys",
    "Lengths",
    "Mask",
    "MeshAxes",
    "Not",
    "Or",
    "Paged",
    "Prefix",
    "Queries",
    "Relations",
    "Request",
    "Segments",
    "Terms",
    "Window",
    "alibi_slopes",
    "attention",
    "attention_probabilities",
    "context_attention",
    "decode_attention",
    "implementations",
    "merge",
    "merge_sinks",
    "sharded_attention",
    "zigzag_order",
]
