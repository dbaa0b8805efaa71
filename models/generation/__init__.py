"""Text from a model: prompts in, new tokens out.

* `generate` whole continuations, and streams of them; `beams` beam search
* `sampling` from logits to a token; `stopping` when a row ends
* `steps` the jitted programs; `prompts`, `padding`, `buckets` what they are given; `job` one call's progress
"""

from .beams import Beams, beam_search
from .generate import Generated, Options, generate, stream
from .prompts import unrolled
from .sampling import GREEDY, Sampling

__all__ = [
    "GREEDY",
    "Beams",
    "Generated",
    "Options",
    "Sampling",
    "beam_search",
    "generate",
    "stream",
    "unrolled",
]
