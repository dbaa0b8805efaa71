"""Our Hopper kernels compiled for an H100 that is not there: registers, spills and shared memory of each.

JAX's CUDA plugin compiles for a described GPU (`h100.textproto`), ptxas included, on a machine without one:
what it refuses, what does not fit into registers and how much shared memory a block takes is known before
anybody rents a GPU. How fast it is, is not.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ... import InputError
from ...models.kernels import ALiBi, Bucketed, Causal, Dense, DenseBias, Dropout, Full, Segments, Window
from ...models.kernels.terms import Terms
from ...research.study.tables import Table

SHARED_MEMORY_LIMIT = 232448  # bytes a block: shared_memory_per_block_optin of h100.textproto
NEEDED = ("jax_cuda13_plugin", "jax_plugins.xla_cuda13")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One attention: B=2, 16 heads, sequences of 4096; `terms` makes its terms from an array maker.

    With a `page` it is a step of decoding, a query a row on a cache in pages of so many keys.
    """

    name: str
    width: int
    terms: Callable[[Callable[..., Any], int], Terms]
    kv_heads: int = 16
    dtype: str = "bfloat16"
    batch: int = 2
    heads: int = 16
    length: int = 4096
    page: int = 0
    deterministic: bool = True


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """What ptxas and Mosaic say of one kernel; bytes of spills, and of shared memory a block."""

    shape: str
    kernel: str
    registers: int
    spill_stores: int
    spill_loads: int
    shared_memory: int


def _plain(make: Any, width: int, mask: Any = None, **others: Any) -> Terms:
    return Terms(Full() if mask is None else mask, scale=width**-0.5, **others)


def _packed(make: Any, width: int) -> Terms:
    return _plain(make, width, Causal() & Segments(make((2, 4096), "int32")))


def _dense(make: Any, width: int) -> Terms:
    return _plain(make, width, Causal(), bias=DenseBias(make((1, 16, 4096, 4096), "float32")))


def _bucketed(make: Any, width: int) -> Terms:
    return _plain(make, width, bias=Bucketed(make((32, 16), "float32")))


def _alibi(make: Any, width: int) -> Terms:
    return _plain(make, width, Causal(), bias=ALiBi(make((16,), "float32")))


def _dropout(make: Any, width: int, **others: Any) -> Terms:
    return _plain(make, width, Causal(), dropout=Dropout(0.1, make((), "uint32")), **others)


def _dense_mask(make: Any, width: int, **others: Any) -> Terms:
    return _plain(make, width, Dense(make((2, 1, 4096, 4096), "bool")), **others)


def _all_tiles(make: Any, width: int) -> Terms:
    bias = DenseBias(make((1, 16, 4096, 4096), "float32"))
    return _dense_mask(make, width, bias=bias, dropout=Dropout(0.1, make((), "uint32")))


def shapes() -> Iterator[Shape]:
    """What we ship."""
    kinds: dict[str, Callable[[Any, int], Terms]] = {
        "full": _plain,
        "causal": functools.partial(_plain, mask=Causal()),
        "window 1024": functools.partial(_plain, mask=Window(1023, 0)),
        "packed causal": _packed,
        "causal, soft cap": functools.partial(_plain, mask=Causal(), soft_cap=30.0),
        "causal, dense bias": _dense,
        "bucketed bias": _bucketed,
        "causal, ALiBi": _alibi,
        "causal, dropout": _dropout,
        "dense mask": _dense_mask,
    }
    for width in (64, 128):
        for name, terms in kinds.items():
            yield Shape(f"{name}, K={width}", width, terms)
        yield Shape(f"causal, 4 of 16 heads, K={width}", width, kinds["causal"], kv_heads=4)
        yield Shape(f"decoding, 4 of 16 heads, K={width}", width, kinds["causal"], kv_heads=4, page=16)
        yield Shape(f"decoding, ALiBi, K={width}", width, kinds["causal, ALiBi"], kv_heads=1, page=64)
    yield Shape("one backward kernel, causal, K=64", 64, kinds["causal"], deterministic=False)
    yield Shape("one backward kernel, dropout, K=64", 64, _dropout, deterministic=False)
    yield Shape("causal, float16, K=128", 128, kinds["causal"], dtype="float16")
    yield Shape("dense bias, dense mask, dropout, K=128", 128, _all_tiles)


def missing() -> str | None:
    """What is to be installed before anything can be compiled for a GPU, or None."""
    absent = [name for name in NEEDED if not _installed(name)]
    if not absent:
        return None
    return (
        f"{', '.join(absent)} is not installed: pip install 'jax[cuda13]', or the wheels of docs/kernels.md"
    )


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def compile_all(chosen: str = "", report: Callable[[str], None] = print) -> list[CompiledKernel]:
    """Forward and backward of each shape whose name contains `chosen`, compiled to sm_90a.

    Raises InputError without the CUDA plugin, and where no shape has such a name.
    """
    if reason := missing():
        raise InputError(f"compiling for a GPU: {reason}")
    if not (of := [shape for shape in shapes() if chosen in shape.name]):
        raise InputError(f"no shape is called {chosen!r}; there are {', '.join(s.name for s in shapes())}")
    found: list[CompiledKernel] = []
    for shape in of:
        report(f"compiling {shape.name}")
        found += compile_shape(shape)
    return found


def compile_shape(shape: Shape) -> list[CompiledKernel]:
    """Its kernels, in the order in which they are compiled."""
    compile_one = _compile_decoding if shape.page else _compile
    return compiled_kernels(shape.name, lambda: compile_one(shape))


def compiled_kernels(name: str, compile_them: Callable[[], object]) -> list[CompiledKernel]:
    """What is said of the kernels that `compile_them` compiles, in their order, under the name of a shape.

    Those that this process has compiled before are not compiled again, and nothing is said of them.
    """
    flags = ("MOSAIC_GPU_DUMP_TO", "MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_HOST_LLVM")
    before = {flag: os.environ.get(flag) for flag in flags}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(dict(zip(flags, (folder, "1", "1"))))
        try:
            compile_them()
        finally:
            for flag, value in before.items():
                os.environ.pop(flag) if value is None else os.environ.update({flag: value})
        reports = sorted(Path(folder).glob("*.ptxas"), key=lambda path: int(path.stem.rsplit("_", 1)[1]))
        return [_read(name, path) for path in reports]


def _compile(shape: Shape) -> None:
    """Output and gradients, in one program."""
    import jax
    import jax.numpy as jnp

    from ...models.kernels.hopper import Hopper

    make, hopper = maker(), Hopper(deterministic=shape.deterministic)
    q, k = (
        make((shape.batch, shape.length, heads, shape.width), shape.dtype)
        for heads in (shape.heads, shape.kv_heads)
    )

    def both(q: Any, k: Any, v: Any, terms: Terms, d_out: Any) -> Any:
        def call(q: Any, k: Any, v: Any, bias: Any) -> Any:
            return hopper(q, k, v, dataclasses.replace(terms, bias=bias))

        (out, lse), pull = jax.vjp(call, q, k, v, terms.bias)
        return out, pull((d_out, jnp.zeros_like(lse)))

    jax.jit(both).lower(q, k, k, shape.terms(make, shape.width), q).compile()


def _compile_decoding(shape: Shape) -> None:
    import jax

    from ...models.kernels import Paged
    from ...models.kernels.hopper.decoding import HopperPages

    make, room = maker(), shape.length // shape.page
    pages = Paged(
        make((shape.batch * room, shape.page, shape.kv_heads, shape.width), shape.dtype),
        make((shape.batch, room), "int32"),
    )
    q, lengths = make((shape.batch, 1, shape.heads, shape.width), shape.dtype), make((shape.batch,), "int32")
    terms = shape.terms(make, shape.width)
    jax.jit(HopperPages().__call__).lower(q, pages, pages, lengths, terms).compile()


@functools.cache
def maker() -> Callable[..., Any]:
    """Makes shapes that live on a described H100."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    description = Path(__file__).with_name("h100.textproto").read_text()
    there = topologies.get_topology_desc("", platform="cuda", target_config=description, topology="1x1x1")
    here = NamedSharding(Mesh(np.array(there.devices[:1]), ("gpu",)), PartitionSpec())

    def make(shape: tuple[int, ...], dtype: str) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    return make


def _read(shape: str, path: Path) -> CompiledKernel:
    """From ptxas's report and, for shared memory, the code that launches the kernel."""
    text, launch = path.read_text(), path.with_suffix(".ll").read_text()
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    memory = re.findall(r"@mosaic_gpu_get_function\(ptr [^,]+, ptr [^,]+, i32 (\d+)", launch)
    return CompiledKernel(
        shape,
        # Pallas renames a kernel that is given a reference
        path.stem.rsplit("_", 1)[0].replace("new_body", "attention_fused_gradient"),
        max(int(count) for count in re.findall(r"Used (\d+) registers", text)),
        max(int(stores) for stores, _ in spills),
        max(int(loads) for _, loads in spills),
        max(map(int, memory)),
    )


def as_text(kernels: list[CompiledKernel]) -> str:
    """The table with what it is made of, Markdown."""
    import jax

    columns = ("attention", "kernel", "registers", "spills, bytes", "shared memory, KiB")
    rows = tuple(
        (k.shape, k.kernel, k.registers, k.spill_stores + k.spill_loads, round(k.shared_memory / 1024, 1))
        for k in kernels
    )
    whole = sum(not kernel.spill_stores for kernel in kernels)
    return f"""# Our Hopper attention kernels, compiled for an H100

By `modicum bench attention-compiled` with JAX {jax.__version__} on a machine without a GPU: bfloat16 where
nothing else is said, B=2, T=S=4096 (T=1 in decoding), 16 heads of queries. Registers are a thread's at
launch; but for decoding, where a block is one warpgroup, the two
warpgroups that compute then take 240 each and the one that copies 24. A block may have
{SHARED_MEMORY_LIMIT / 1024:.0f} KiB of shared memory. {whole} of {len(kernels)} kernels need no more
registers; the others are short of a few beside the accumulators of dk and dv. Speed is not known from this.

{Table(columns, rows).markdown()}"""
