"""Feed-forward layers of which each token uses some experts: one front, one reference, one file a way.

`front` has `sparse_feed_forward()`, `experts` the weights it takes, `registry` chooses the implementation of
a `request`: `tpu` and `hopper` (Pallas), `native` (C++ on CPUs, compiled on demand), `gather` (XLA, for few
tokens), `mask` (the reference, for many), by name `steps`.
"""

from .experts import Experts
from .front import sparse_feed_forward
from .registry import implementations
from .request import SparseImplementation, SparseRequest, sparse_request

__all__ = [
    "Experts",
    "SparseImplementation",
    "SparseRequest",
    "implementations",
    "sparse_feed_forward",
    "sparse_request",
]
