"""End to end: tokens of a decoder with dense feed-forward layers beside the same with them in experts.

Weights are random, so that no checkpoint is needed: a token costs the same whatever they are, but for rows of
silent neurons, which the native kernel skips and half of which are silent at random.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...models import MLP, MoefiedMLP, Transformer, preset
from ...models.generation import generate
from ...research.study.tables import Cell, Table

NEW, PROMPT, SIZE = 16, 8, 32


@dataclass(frozen=True)
class Decoded:
    """Seconds a token, turn by turn, of the `dense` model and of the converted one at each share."""

    name: str
    parameters: int
    dense: list[float]
    sparse: dict[float, list[float]]


def measure_decoding(
    name: str, shares: Sequence[float], rounds: int, impl: str, report: Callable[[str], None] = print
) -> Decoded:
    """Greedy tokens at batch 1 of the preset `name`, its activation function ReLU; contenders take turns."""
    config = preset(name)
    width = 4 * config.width
    dense = Transformer(replace(config, mlp=MLP(width, "relu")))
    experts = width // SIZE
    few = {share: max(1, round(share * experts)) for share in shares}
    models = {0.0: dense} | {
        share: Transformer(replace(config, mlp=MoefiedMLP(width, experts, chosen, impl=impl)))
        for share, chosen in few.items()
    }
    report(f"{name}: making weights and compiling")
    params = {0.0: _weights(dense)}
    one = _weights(models[shares[0]])  # the same for every share
    times: dict[float, list[float]] = {key: [] for key in models}
    for turn in range(rounds + 1):  # the first compiles
        for key, model in models.items():
            seconds = _seconds_a_token(model, params.get(key, one))
            if turn:
                times[key].append(seconds)
    count = sum(leaf.size for leaf in jax.tree.leaves(params[0.0]))
    return Decoded(name, count, times.pop(0.0), times)


def decoding_table(found: Sequence[Decoded]) -> Table:
    """A row a model and share: milliseconds a token, and the median of paired ratios with quartiles."""
    rows: list[tuple[Cell, ...]] = []
    for one in found:
        rows.append((one.name, one.parameters, "100%", round(1e3 * float(np.median(one.dense)), 1), None))
        for share, times in one.sparse.items():
            low, middle, high = np.percentile(np.divide(one.dense, times), [25, 50, 75])
            told = f"{middle:.2f} ({low:.2f}–{high:.2f})"
            rows.append(
                (one.name, one.parameters, f"{share:.0%}", round(1e3 * float(np.median(times)), 1), told)
            )
    caption = f"Greedy decoding at batch 1, {NEW} tokens a turn, float32, random weights, ReLU, MLP routers."
    return Table(("shape", "parameters", "neurons", "ms a token", "times faster"), tuple(rows), caption)


def _weights(model: Transformer) -> Any:
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))


def _seconds_a_token(model: Transformer, params: Any) -> float:
    prompt = [list(range(1, PROMPT + 1))]
    taken = []
    for new in (1, NEW + 1):
        start = time.perf_counter()
        jax.block_until_ready(generate(model, params, prompt, max_new_tokens=new).tokens)
        taken.append(time.perf_counter() - start)
    return (taken[1] - taken[0]) / NEW
