"""Our TPU attention compiled by libtpu for chips that are not there, and the kernels in it."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ...models import kernels
from ...models.kernels.tpu import Tpu

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@dataclass(frozen=True)
class CompiledCase:
    """A call to compile, forward and backward; `terms` makes its terms for the lengths and heads.

    There are as many keys as queries where `keys` is 0.
    """

    terms: Callable[[CompiledCase], kernels.Terms]
    length: int = 256
    keys: int = 0
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    batch: int = 4
    devices: int = 1
    dtype: str = "bfloat16"


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    """An array to trace with: no number of it is read."""
    return np.zeros(shape, dtype)


def _tree(case: CompiledCase) -> kernels.Terms:
    each, length = zeros(case.batch, dtype=np.int32), case.length
    flags = kernels.Keys(zeros(case.batch, length, dtype=bool))
    dense = kernels.Dense(zeros(1, case.heads, length, length, dtype=bool))
    return kernels.Terms(
        (kernels.Causal(each) & ~kernels.Window(2, 0))
        | (kernels.Prefix(each) & flags & dense)
        | (kernels.Full() & kernels.Queries(flags.flags))
    )


def _packed(case: CompiledCase) -> kernels.Terms:
    ids = zeros(case.batch, case.length, dtype=np.int32)
    return kernels.Terms(kernels.Causal() & kernels.Segments(ids))


def _everything(case: CompiledCase) -> kernels.Terms:
    return kernels.Terms(
        kernels.Causal(),
        soft_cap=30.0,
        sinks=zeros(case.heads),
        dropout=kernels.Dropout(0.1, np.asarray(0, np.uint32)),
    )


def _biased(bias: Callable[[CompiledCase], kernels.Bias]) -> Callable[[CompiledCase], kernels.Terms]:
    return lambda case: kernels.Terms(kernels.Causal(), bias(case))


def relations(case: CompiledCase) -> kernels.Bias:
    """512 buckets, and 32 relations to 20 segments."""
    ids = zeros(case.batch, case.length, dtype=np.int32)
    related = zeros(case.batch, case.length, 20, dtype=np.int32)
    return kernels.Relations(zeros(512 + 32, case.heads), related, ids, ids, ids, ids, ids)


CASES = {
    "causal": CompiledCase(lambda case: kernels.Terms(kernels.Causal()), length=1024),
    **{
        f"{length} queries": CompiledCase(
            lambda case: kernels.Terms(kernels.Causal()), length=length, heads=1, kv_heads=1, batch=1
        )
        for length in (32768, 40960)
    },
    "16384 queries of 2 heads": CompiledCase(
        lambda case: kernels.Terms(kernels.Full()), length=16384, heads=2, kv_heads=1, batch=1
    ),
    "packed on 4 devices": CompiledCase(_packed, width=64, devices=4),
    "mask tree": CompiledCase(_tree, length=250),
    "dense bias": CompiledCase(
        _biased(lambda c: kernels.DenseBias(zeros(1, c.heads, c.length, c.length))), width=64
    ),
    "bias of keys": CompiledCase(
        _biased(lambda c: kernels.DenseBias(zeros(c.batch, 1, 1, c.length))), dtype="float32"
    ),
    "bucketed": CompiledCase(_biased(lambda c: kernels.Bucketed(zeros(32, c.heads), offset=np.asarray(3)))),
    "relations": CompiledCase(_biased(relations), length=1024, width=64),
    "alibi": CompiledCase(_biased(lambda c: kernels.ALiBi(zeros(c.heads)))),
    "sinks, dropout, soft cap": CompiledCase(_everything, width=64),
}


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    return None if importlib.util.find_spec("libtpu") else "libtpu is not installed"


def compile_named(name: str, chip: str) -> list[str]:
    """Compile a case of `CASES`; the names of the kernels in it, sorted."""
    text = compile_case(CASES[name], chip).as_text()
    return sorted(set(re.findall(r"%\w*?(attention_[a-z_]+?)_*\.?\d* = .*tpu_custom_call", text)))


def compile_case(case: CompiledCase, chip: str, implementation: Any = None) -> Any:
    """The compiled gradients of a case, its batch split over its devices."""
    implementation = Tpu() if implementation is None else implementation
    mesh = mesh_of(chip, case.devices)
    split, same = PartitionSpec("data"), PartitionSpec()
    terms = case.terms(case)
    specs = jax.tree.map(lambda x: split if jnp.shape(x)[:1] == (case.batch,) else same, terms)

    def gradients(q: Any, k: Any, v: Any, terms: kernels.Terms) -> Any:
        outputs, pull = jax.vjp(implementation, q, k, v, terms)
        dq, dk, dv, d_terms = pull(outputs)
        return dq, dk, dv, [x for x in jax.tree.leaves(d_terms) if x.dtype != jax.dtypes.float0]

    of_keys = (case.keys or case.length, case.kv_heads, case.width)
    q, k, v = (
        jax.ShapeDtypeStruct((case.batch, *shape), case.dtype, sharding=NamedSharding(mesh, split))
        for shape in ((case.length, case.heads, case.width), of_keys, of_keys)
    )
    given = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        terms,
        specs,
    )
    run: Any = gradients
    if case.devices > 1:
        sharded = (split, split, split)
        run = jax.shard_map(gradients, mesh=mesh, in_specs=(*sharded, specs), out_specs=(*sharded, same))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # block sizes go by the chip
        return jax.jit(run).lower(q, k, v, given).compile()


def mesh_of(chip: str, devices: int) -> Mesh:
    """Devices of a chip that need not be there."""
    found = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
    return Mesh(np.array(found[:devices]), ("data",), axis_types=(AxisType.Auto,))
