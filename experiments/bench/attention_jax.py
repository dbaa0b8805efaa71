"""Ours, the plain softmax and `jax.nn` as contenders, in one process: the same arrays, compiled ahead."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...models.kernels import (
    ALiBi,
    Bias,
    Bucketed,
    Causal,
    DenseBias,
    Full,
    Mask,
    Segments,
    Window,
    alibi_slopes,
    attention,
    implementations,
)
from ...models.kernels.front import terms_of
from ...models.kernels.request import request_of
from ...models.kernels.spans import Span
from .attention_bundled import bundled
from .attention_job import AttentionJob

Array = jax.Array
SAMPLE = 64
"""How many numbers of an output are compared with those of others."""
BY_NAME_ONLY = ("hopper_fused",)
"""Of ours those that nobody is given who has not asked, and that are measured all the same."""


class JaxAttention:
    """All that JAX can offer for the job; `prepare` compiles one of them, `attend` runs what is compiled."""

    def __init__(self, job: AttentionJob) -> None:
        self.job = job
        # half of a GPU's memory, before JAX takes most of it: PyTorch's process is on the same GPU
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
        device = jax.devices()[0]
        self.versions = f"jax {jax.__version__} on {device.device_kind}"
        self.ready: dict[tuple[str, bool], Callable[[], Any]] = {}

    def contenders(self, length: int) -> dict[str, str]:
        """Names of who takes part, and reasons of who cannot or would not be chosen (empty where it does)."""
        q, k, _, _, bias = self.given(length)
        request = request_of(
            q, k, k, terms_of(q, k, k, self.mask(length), bias, None, None, None, None), False
        )
        ours = {
            x.name: x.supports(request) or (x.name not in BY_NAME_ONLY and x.unfit(request)) or ""
            for x in implementations()
            if x.name != "reference"
        }
        peers = {"plain softmax": "", "jax.nn": ""}
        if jax.default_backend() == "gpu":
            peers |= {"jax.nn cuDNN": "", **dict.fromkeys(bundled(self.job), "")}
        return ours | peers

    def prepare(self, name: str, length: int, backward: bool) -> dict[str, Any]:
        """Compile; XLA's temporary bytes, and some numbers of the output."""
        q, k, v, d_out, bias = self.given(length)

        def forward(q: Array, k: Array, v: Array, bias: Bias | None) -> Array:
            return self.function(name, length)(q, k, v, bias)

        def both(q: Array, k: Array, v: Array, bias: Bias | None) -> Any:
            out, pull = jax.vjp(forward, q, k, v, bias)
            return out, pull(d_out)

        try:
            compiled = jax.jit(both if backward else forward).lower(q, k, v, bias).compile()
        except Exception as error:  # of others' kernels whatever they raise is why they take no part
            if name in {x.name for x in implementations()} | {"plain softmax"}:
                raise
            return {"left_out": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
        self.ready[name, backward] = lambda: compiled(q, k, v, bias)
        analysis = compiled.memory_analysis()
        return {"temporary": None if analysis is None else analysis.temp_size_in_bytes}

    def attend(self, name: str, backward: bool, calls: int = 1) -> Any:
        """So many calls, waited for: on an accelerator the last, on a CPU, where they would overlap, each."""
        overlap = jax.default_backend() == "cpu"
        for _ in range(calls):
            result = self.ready[name, backward]()
            if overlap:
                jax.block_until_ready(result)
        return jax.block_until_ready(result)

    def sample(self, result: Any) -> list[float]:
        """Some numbers of what `attend` gave, evenly over the first row's output."""
        out = np.asarray(result[0] if isinstance(result, tuple) else result, np.float32)[0].reshape(-1)
        return out[:: max(1, len(out) // SAMPLE)][:SAMPLE].tolist()

    def forget(self) -> None:
        """Let go of all that is compiled."""
        self.ready.clear()
        self.given.cache_clear()

    @lru_cache(maxsize=1)  # noqa: B019 (one contender lives as long as its process)
    def given(self, length: int) -> tuple[Array, Array, Array, Array, Bias | None]:
        """q, k, v, the output's cotangent and the bias."""
        q, d_out, k, v = (jnp.asarray(x, self.job.dtype) for x in self.job.arrays(length))
        return q, k, v, d_out, jax.tree.map(jnp.asarray, self.bias(length))

    def mask(self, length: int) -> Mask:
        """The job's mask as an expression."""
        match self.job.mask:
            case "full":
                return Full()
            case "causal":
                return Causal()
            case "window":
                return Window(self.job.window, 0)
            case _:
                return Causal() & Segments(jnp.asarray(self.job.segments(length)))

    def bias(self, length: int) -> Bias | None:
        """The job's bias as an expression; buckets and slopes as T5 and ALiBi have them."""
        match self.job.bias:
            case "dense":
                return DenseBias(self.job.dense(length))
            case "bucketed":
                return Bucketed(self.job.table())
            case "alibi":
                return ALiBi(alibi_slopes(self.job.heads))
            case _:
                return None

    def function(self, name: str, length: int) -> Callable[..., Array]:
        """Attention as a contender computes it, of q, k, v and bias."""
        mask = self.mask(length)
        if attend := bundled(self.job).get(name):
            return lambda q, k, v, bias: attend(q, k, v)
        if name.startswith("jax.nn"):
            kernel = "cudnn" if name.endswith("cuDNN") else "xla"
            return lambda q, k, v, bias: jax_nn(q, k, v, bias, mask, kernel)
        impl = "reference" if name == "plain softmax" else name
        return lambda q, k, v, bias: attention(q, k, v, mask=mask, bias=bias, impl=impl)


def jax_nn(q: Array, k: Array, v: Array, bias: Bias | None, mask: Mask, implementation: Any) -> Array:
    """`jax.nn.dot_product_attention`; what it has no word for is written out as an array, as its users do."""
    options: dict[str, Any] = {}
    rows, columns = Span(0, q.shape[1]), Span(0, k.shape[1])
    match mask:
        case Full():
            pass
        case Causal():
            options["is_causal"] = True
        case Window(left=left):
            options |= {"is_causal": True, "local_window_size": (left, 0)}
        case _:
            options["mask"] = mask.predicate(rows, columns)
    if bias is not None:
        options["bias"] = bias.tile(rows, columns).astype(q.dtype)
    return jax.nn.dot_product_attention(q, k, v, implementation=implementation, **options)
