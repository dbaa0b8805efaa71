"""What the backward pass of a layer computes again, by name, and which layers do what.

A policy keeps a layer's input and what it names of the layer's own values, and computes the rest again:

    none      keeps everything; beside layers of other policies in a scan, products and `ROWS`
    dots      keeps what comes out of matrix products (`jax.checkpoint_policies.dots_saveable`)
    mlp       keeps queries, keys, values and the stream between attention and mlp: the mlp is computed again
    middle    keeps the stream between attention and mlp: all is computed again but attention's output product
    full      keeps nothing
    offload   keeps nothing, and the layer's input lies in the host's memory until it is needed

What they keep and cost on a chip is in docs/plan.md; the names are those of the layer's children and hooks.
This module imports no jax.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from .. import InputError

KEPT: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "dots": (),
    "mlp": ("query", "key", "value", "middle"),
    "middle": ("middle",),
    "full": (),
    "offload": (),
}
NAMES = tuple(KEPT)
ROWS = ("attention_norm", "cross_attention_norm", "mlp_norm", "heads", "middle", "act", "mid")
INPUT = "layer_input"  # what `offload` sends away
RUN = re.compile(r"(\w+):(\d+)")

Runs = tuple[tuple[str, int], ...]


def remat_runs(text: str, layers: int) -> Runs:
    """(policy, layers) from the first on: `full` for all, `full:64,none:32` for the first 64 and the rest.

    Raises InputError for an unknown policy and where the layers do not add up.
    """
    if text in KEPT:
        return ((text, layers),)
    parts = [RUN.fullmatch(part.strip()) for part in text.split(",")]
    known = [(part[1], int(part[2])) for part in parts if part and part[1] in KEPT]
    if len(known) < len(parts):
        raise InputError(
            f"remat={text!r} is not one of {', '.join(NAMES)}, nor runs of layers such as full:2,none:1"
        )
    if sum(count for _, count in known) != layers or not all(count for _, count in known):
        counted = " + ".join(str(count) for _, count in known)
        raise InputError(f"remat={text!r} is for {counted} layers; the model has {layers}")
    return tuple(known)


def remat_text(choices: tuple[str, ...]) -> str:
    """The shortest text that `remat_runs` reads as these policies, one a layer; equal ones are put together.

    Which layers compute again does not matter to time or memory, only how many.
    """
    counts = {name: choices.count(name) for name in NAMES if name in choices}
    if len(counts) == 1:
        return next(iter(counts))
    return ",".join(f"{name}:{count}" for name, count in counts.items())
