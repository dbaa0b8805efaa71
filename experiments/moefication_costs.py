"""What converted feed-forward layers cost beside the dense ones: time on this machine, one token at a time.

Layers are those of the study's models, cut into clusters, with their routers, and read what they read in the
model; the dense stack and all others take turns. `auto` is the implementation.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ..models.model import Params
from ..models.selection import OracleSelection
from ..research.sparsity.feed_forward import subtree
from ..research.sparsity.moefication import Moefication, layer_parameters, moefied_config
from ..research.study.runs import RESULT, run_name
from ..research.study.study import run_cell
from .bench.ffn import DENSE, Key, Seen, take_turns
from .bench.ffn_job import Run
from .moefication_work import ROUTERS, Cell, Work

REVISION = 1
CONSTRUCTION = "clusters"
TOKENS, ROUNDS = 16, 15


@dataclass(frozen=True)
class Timing:
    """The question: the layers of which cells, how many tokens one after another, how many turns."""

    cells: tuple[Cell, ...]
    tokens: int = TOKENS
    rounds: int = ROUNDS


def layer_times(work: Work, measure: bool) -> list[dict[str, Any]]:
    """A mapping a router and share: how many times `faster` than dense (median, quartiles), `ms` a token.

    Measured now and kept beside the cells; without `measure` what was kept there, nothing where nothing was.
    """
    names = [name for name in work.size.routers if not isinstance(ROUTERS[name], OracleSelection)]
    cells = tuple(work.cell(CONSTRUCTION, name, work.size.seeds[0]) for name in names)
    asked = Timing(cells)
    name = f"{work.subject.name}-times".replace(" ", "-")
    given: dict[str, Any] = {"data_fingerprint": work.subject.identity, "revision": REVISION}
    done = work.folder / run_name(name, asked, 0, **given) / RESULT
    if not (measure or done.exists()):
        return []
    times = measured(work, asked) if measure else []
    if measure:
        done.unlink(missing_ok=True)  # no earlier: a failure loses nothing

    def ask(folder: Path) -> Mapping[str, Any]:
        return {"times": times}

    found = run_cell(work.folder, asked, name, ask, seed=0, **given)
    return [{"subject": work.subject.name, **each} for each in found.result["times"]]


def measured(work: Work, asked: Timing) -> list[dict[str, Any]]:
    """The paired times, now."""
    config, paths = work.layers.model.config, list(work.layers.dense)
    rows = jnp.stack([work.unseen()[path][: asked.tokens] for path in paths], axis=1)
    dense = [subtree(work.layers.params, path) for path in paths]
    base: Key = (work.subject.name, 1, 1.0, DENSE)
    runs: dict[Key, Run] = {base: _one_by_one(config.mlp.build(config), rows, dense)}
    for cell in asked.cells:
        assert cell.selection is not None
        experts, routers = work.converted(cell)
        params = [layer_parameters(experts[path], routers[path]) for path in paths]
        for share in cell.shares:
            wanted = Moefication(share, cell.neurons, selection=cell.selection)
            module = moefied_config(config, wanted).mlp.build(config)
            runs[base[0], 1, share, cell.router] = _one_by_one(module, rows, params)
    seen = Seen(load=[round(os.getloadavg()[0], 1)])
    for run in runs.values():
        jax.block_until_ready(run())
    take_turns(runs, asked.rounds, seen.times)
    return [_row(seen, key, base, asked.tokens) for key in runs if key != base]


def _row(seen: Seen, key: Key, base: Key, tokens: int) -> dict[str, Any]:
    took = {"ms": seen.milliseconds(key) / tokens, "dense ms": seen.milliseconds(base) / tokens}
    return {"router": key[3], "share": key[2], "faster": seen.gain(key), **took, "load": seen.load[0]}


def _one_by_one(module: nn.Module, rows: jax.Array, layers: Sequence[Params]) -> Run:
    """A call that takes each of `rows [N, L, D]` through the layers, in a loop as decoding is."""

    @jax.jit
    def run(rows: jax.Array, layers: Sequence[Params]) -> jax.Array:
        def token(row: jax.Array) -> jax.Array:
            found: list[Any] = []
            for x, params in zip(row, layers):
                x, *_ = lax.optimization_barrier((x, *found[-1:]))  # one layer after the other
                found.append(module.apply({"params": params}, x[None, None]))
            return jnp.concatenate(found)

        return lax.map(token, rows)

    return partial(run, rows, layers)
