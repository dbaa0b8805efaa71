"""The attention kernels for GPUs that JAX bundles (`jax.experimental.pallas.ops.gpu`), as contenders."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from .attention_job import AttentionJob

Array = jax.Array
Attend = Callable[[Array, Array, Array], Array]


def bundled(job: AttentionJob) -> dict[str, Attend]:
    """Those that compute the job's attention, by name: of q `[B, T, H, K]` and k, v of as many heads.

    They have no windows and no biases; the one for Mosaic no bfloat16, so that it casts to float16, and no
    backward pass under a causal mask.
    """
    if job.mask not in ("full", "causal") or job.bias != "none" or job.heads != job.kv_heads:
        return {}
    return {"Pallas Triton": _triton(job), "Pallas Mosaic, float16": _mosaic(job)}


def _triton(job: AttentionJob) -> Attend:
    """With the tiles that it has by itself."""

    def attend(q: Array, k: Array, v: Array) -> Array:
        from jax.experimental.pallas.ops.gpu.attention import mha

        return mha(q, k, v, None, sm_scale=job.width**-0.5, causal=job.mask == "causal")

    return attend


def _mosaic(job: AttentionJob) -> Attend:
    """It knows no scale; tiles as in our own kernels, which began as tokamax's for an H100 have them."""

    def attend(q: Array, k: Array, v: Array) -> Array:
        from jax.experimental.pallas.ops.gpu.attention_mgpu import TuningConfig, attention

        config = TuningConfig(
            64,
            128,
            2,
            causal=job.mask == "causal",
            compute_wgs_bwd=2,
            block_q_dkv=64,
            block_kv_dkv=64,
            block_q_dq=64,
            block_kv_dq=64,
        )
        q, k, v = (x.astype(jnp.float16) for x in (q * job.width**-0.5, k, v))
        return attention(q, k, v, config)

    return attend
