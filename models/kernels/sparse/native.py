"""A C++ loop behind XLA's foreign function interface, compiled on the machine that asks for it.

Modicum installs without a compiler. Where there is one, `impl="native"` compiles `native.cpp` once, into a
folder of its own in the user's cache; from then on "auto" takes it on this machine, too.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .... import InputError
from ..request import PARTITIONED
from .experts import Experts
from .gradient import with_portable_gradient
from .request import SparseRequest

logger = logging.getLogger("modicum.kernels")

TARGET = "modicum_sparse_feed_forward"
SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp-simd", "-ffp-contract=fast")
ACTIVATIONS = ("relu", "relu2", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh")  # in the order of native.cpp
MOST_TOKENS = {1 / 3: 128, 0.5: 16, 1.0: 2}  # by the largest share of neurons: docs/sparsity.md


@dataclasses.dataclass(frozen=True)
class Native:
    """Reads each chosen expert once, for all tokens that chose it, and skips the rows of silent neurons.

    XLA's own threads do it. Experts come in parts whose sums are added in order: the same bits every time, on
    so many threads.
    """

    name: str = "native"

    def supports(self, request: SparseRequest) -> str | None:
        """Float32 on CPUs, where a compiler is or was."""
        if request.platform != "cpu":
            return f"it is for CPUs, not {request.platform}"
        if request.dtype != "float32":
            return f"it computes in float32, not {request.dtype}"
        if request.activation not in ACTIVATIONS:
            return f"it knows {', '.join(ACTIVATIONS)}, not {request.activation}"
        if not library().exists() and compiler() is None:
            return "there is no C++ compiler (c++, or what CXX names)"
        return None

    def unfit(self, request: SparseRequest) -> str | None:
        """Nothing is compiled unasked, and many tokens are better served by dense products."""
        if request.partitioned:
            return PARTITIONED
        if not library().exists():
            return "it is not compiled yet: impl='native' does so"
        if reason := _not_loaded():
            return reason
        most = next(tokens for share, tokens in MOST_TOKENS.items() if request.share <= share)
        if request.tokens > most:
            return f"{request.tokens} tokens of {request.share:.0%} of the neurons each are more than {most}"
        return None

    def __call__(self, x: Array, experts: Experts, chosen: Array) -> Array:
        """`[N, D]`; the backward pass is that of `gather` or `mask`."""
        register()
        return with_portable_gradient(_call, x, experts.without_output_bias(), chosen)


def _call(x: Array, experts: Experts, chosen: Array) -> Array:
    nothing = jnp.zeros((0,), jnp.float32)
    given = (experts.gate, experts.up_bias, experts.gate_bias)
    optional = [nothing if leaf is None else leaf for leaf in given]
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(x.shape, x.dtype), vmap_method="sequential")
    number = np.int64(ACTIVATIONS.index(experts.activation))
    return call(x, experts.up, *optional, experts.down, chosen.astype(jnp.int32), activation=number)


def compiler() -> str | None:
    """The C++ compiler of this machine, if any."""
    return shutil.which(os.environ.get("CXX", "c++"))


@functools.cache
def library() -> Path:
    """Where the compiled library lies: for this source, these flags, this processor and this jax."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")  # empty is not the working folder
    asked = (SOURCE.read_text(), FLAGS, jax.__version__, _processor())
    digest = hashlib.sha256(repr(asked).encode()).hexdigest()[:16]
    return home / "modicum" / f"sparse-{digest}.so"


@functools.cache
def register() -> None:
    """Compile where that is not done yet, and tell XLA; raises `InputError` with the compiler's words."""
    path = library()
    if not path.exists():
        _compile(path)
    try:
        handler = getattr(ctypes.CDLL(str(path)), TARGET)
    except OSError as error:
        raise InputError(f"impl='native': {path} cannot be loaded ({error}); delete it") from None
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(handler), platform="cpu")


def _not_loaded() -> str | None:
    """Why a library that is there cannot be used, or None."""
    try:
        register()
    except InputError as error:
        return str(error)
    return None


def _compile(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"impl='native' cannot make {path.parent}: {error}") from None
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        given = [str(compiler()), *FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(made)]
        logger.info("compiling %s: %s", SOURCE.name, " ".join(given))
        done = subprocess.run(given, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no output"]
            why = next((line for line in lines if "error" in line), lines[-1])
            raise InputError(f"impl='native': {compiler()} cannot compile {SOURCE}: {why}")
        made.replace(path)  # whole or not at all, whoever else compiles


def _processor() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"
