"""sparse_feed_forward(): the one function models call, whatever computes it."""

from __future__ import annotations

from jax import Array

from .experts import Experts
from .registry import choose
from .request import sparse_request


def sparse_feed_forward(x: Array, experts: Experts, chosen: Array, *, impl: str = "auto") -> Array:
    """The feed-forward layer of x `[..., D]` with only each token's `chosen` experts `[..., k]`: `[..., D]`.

    The indices in `chosen` are distinct for each token. The chosen experts' outputs are added up and not
    weighted (Zhang et al., "MoEfication", 2022, section 3.1), so that with all of them it is the dense layer.
    Differentiable in x and the experts; which are chosen has no gradient.

    `impl` is "auto" or a name of `implementations()`; the choice is logged to `modicum.kernels` when traced.
    Raises `InputError` where shapes do not fit, the name is unknown or the named one cannot do it.
    """
    experts.check(x, chosen)
    rows, picked = x.reshape(-1, x.shape[-1]), chosen.reshape(-1, chosen.shape[-1])
    out = choose(sparse_request(rows, experts, picked), impl)(rows, experts, picked)
    out = out if experts.down_bias is None else out + experts.down_bias.astype(out.dtype)
    return out.reshape(x.shape)
