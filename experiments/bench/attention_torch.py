"""PyTorch's `scaled_dot_product_attention` as a contender, on the same arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from .attention_job import AttentionJob

SAMPLE = 64


class TorchAttention:
    """SDPA as PyTorch chooses its kernel, on a GPU where one is to be had and the job is not for CPUs."""

    def __init__(self, job: AttentionJob, on_cpu: bool) -> None:
        self.job = job
        self.device = "cuda" if torch.cuda.is_available() and not on_cpu else "cpu"
        self.versions = f"torch {torch.__version__} on {self.device}"
        self.ready: dict[tuple[str, bool], Callable[[], Any]] = {}

    def contenders(self, length: int) -> dict[str, str]:
        """Itself."""
        return {"SDPA": ""}

    def prepare(self, name: str, length: int, backward: bool) -> dict[str, Any]:
        """Bring the arrays to the device, heads before positions as SDPA wants them."""
        dtype = getattr(torch, self.job.dtype)
        arrays = [
            torch.from_numpy(x).to(self.device, dtype).transpose(1, 2).contiguous()
            for x in self.job.arrays(length)
        ]
        q, d_out, k, v = arrays
        options = self.options(length, dtype, backward)
        leaves = [q, k, v] + [x for x in options.values() if isinstance(x, torch.Tensor) and x.requires_grad]
        for leaf in (q, k, v):
            leaf.requires_grad_(backward)

        def call() -> Any:
            out = scaled_dot_product_attention(
                q, k, v, enable_gqa=self.job.heads != self.job.kv_heads, **options
            )
            return (out, torch.autograd.grad(out, leaves, d_out)) if backward else (out,)

        self.ready[name, backward] = call
        return {"temporary": self.temporary(call)}

    def attend(self, name: str, backward: bool, calls: int = 1) -> Any:
        """So many calls, waited for."""
        for _ in range(calls):
            result = self.ready[name, backward]()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return result

    def sample(self, result: Any) -> list[float]:
        """Some numbers of the output, evenly over the first row, in JAX's order of axes."""
        out = result[0][0].detach().transpose(0, 1).float().cpu().numpy().reshape(-1)
        return out[:: max(1, len(out) // SAMPLE)][:SAMPLE].tolist()

    def forget(self) -> None:
        """Let go of the arrays."""
        self.ready.clear()

    def temporary(self, call: Callable[[], Any]) -> int | None:
        """Bytes that a call has on the GPU beside its inputs; on CPUs PyTorch does not tell."""
        if self.device != "cuda":
            return None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before

    def options(self, length: int, dtype: torch.dtype, backward: bool) -> dict[str, Any]:
        """Mask and bias in SDPA's words: a triangle it knows, all else is an array."""
        if self.job.bias == "none" and self.job.mask in ("full", "causal"):
            return {"is_causal": self.job.mask == "causal"}
        keys = np.arange(length)
        seen = (keys >= self.job.first_keys(length)[:, None]) & (keys <= self.job.last_keys(length)[:, None])
        allowed = torch.from_numpy(seen).to(self.device)
        if self.job.bias == "none":
            return {"attn_mask": allowed}
        bias = torch.from_numpy(self.numbers(length)).to(self.device, dtype)
        bias = bias.masked_fill(~allowed, float("-inf"))
        return {"attn_mask": bias.requires_grad_(backward and self.job.bias != "alibi")}

    def numbers(self, length: int) -> np.ndarray:
        """The bias in full, `[1, H, T, T]`."""
        if self.job.bias == "dense":
            return self.job.dense(length)
        from ...models.kernels import ALiBi, Bucketed, alibi_slopes
        from ...models.kernels.spans import Span

        heads = self.job.heads
        bias = Bucketed(self.job.table()) if self.job.bias == "bucketed" else ALiBi(alibi_slopes(heads))
        return np.array(bias.tile(Span(0, length), Span(0, length)))
