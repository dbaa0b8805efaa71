"""Our attention on pages compiled by libtpu for chips that are not there: are they read in place?"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ...models import kernels
from ...models.kernels.tpu.decoding import Pages
from .attention_tpu import mesh_of


@dataclass(frozen=True)
class PagedCase:
    """A step of decoding: pages of `page` keys, up to `room` a row."""

    queries: int = 1
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    batch: int = 8
    page: int = 16
    room: int = 64
    dtype: str = "bfloat16"
    everything: bool = False  # window, soft cap, ALiBi and sinks


CASES = {
    "grouped heads": PagedCase(),
    "one key head, everything": PagedCase(2, 8, 1, page=64, everything=True),
    "as many key heads, float32": PagedCase(4, 16, 16, batch=3, dtype="float32", everything=True),
}


def compile_pages(name: str, chip: str) -> dict[str, Any]:
    """Compile a case of `CASES`: names of its kernels, and copies that XLA makes of the pool."""
    case = CASES[name]
    same = NamedSharding(mesh_of(chip, 1), PartitionSpec())

    def array(*shape: int, dtype: Any = case.dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=same)

    pool = array(case.batch * case.room, case.page, case.kv_heads, case.width)
    pages = kernels.Paged(pool, array(case.batch, case.room, dtype=jnp.int32))
    q = array(case.batch, case.queries, case.heads, case.width)
    given = (q, pages, pages, array(case.batch, dtype=jnp.int32), array(case.heads, dtype=jnp.float32))
    text = jax.jit(lambda *given: _decode(case, *given)).lower(*given).compile().as_text() or ""
    copies = re.findall(rf"= \w+\[{pool.shape[0]},{pool.shape[1]},[^=]* copy\(", text)
    return {"kernels": sorted(set(re.findall(r"%(attention_[a-z]+)", text))), "copies": copies}


def _decode(case: PagedCase, q: Any, k: Any, v: Any, lengths: Any, slopes: Any) -> Any:
    start = lengths - case.queries
    terms = kernels.Terms(kernels.Causal(start))
    if case.everything:
        bias = kernels.ALiBi(slopes, start)
        terms = kernels.Terms(kernels.Window(100, 0, start), bias, soft_cap=30.0, sinks=slopes)
    return Pages()(q, k, v, lengths, terms)
