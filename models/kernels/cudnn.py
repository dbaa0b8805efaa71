"""cuDNN's flash attention through `jax.nn`, for the requests that it computes exactly.

It is here for comparison and on request: it has fewer masks, no gradients of the log-sum-exp and no biases
whose gradient could be trusted (jax#30593). Reasons are those of jax's own checks
(`jax/_src/cudnn/fused_attention_stablehlo.py`, jax 0.10) and of its documentation.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .masks import And, Causal, Full, Mask, Window, describe
from .request import Request
from .spans import accumulation_dtype
from .terms import Terms


@dataclasses.dataclass(frozen=True)
class CuDNN:
    """bfloat16 and float16 on NVIDIA GPUs; whole, causal or windowed causal square attention."""

    name: str = "cudnn"

    def supports(self, request: Request) -> str | None:
        """Every reason at once, so that who asks for it need not go through them one by one."""
        square = request.queries == request.keys
        missing = {
            f"it runs on NVIDIA GPUs, not on {request.platform}": request.platform not in ("gpu", "cuda"),
            f"its types are bfloat16 and float16, not {request.dtype}": request.dtype
            not in ("bfloat16", "float16"),
            "it has no soft cap": request.soft_cap,
            "it has no sinks": request.sinks,
            "its dropout is not that of other implementations": bool(request.dropout),
            "its gradient of a bias is not one to rely on": request.bias is not None,
            "it gives no gradient of the log-sum-exp, and rounds it": request.lse,
            f"its widths are multiples of 8 up to {widest()}, not {request.width}": request.width % 8 != 0
            or request.width > widest(),
            f"its values are as wide as keys, not {request.value_width}": request.value_width
            != request.width,
            f"it has no {describe(request.mask)}: its masks are Full, Causal and a causal Window": (
                options_of(request.mask) is None
            ),
            "its triangle is that of as many keys as queries": not isinstance(request.mask, Full)
            and not square,
        }
        return "; ".join(reason for reason, applies in missing.items() if applies) or None

    def unfit(self, request: Request) -> str | None:
        """It was never measured against the others here."""
        return "it is taken when asked for by name"

    def __call__(self, q: Array, k: Array, v: Array, terms: Terms) -> tuple[Array, Array]:
        """Output `[B, T, H, K]`, and no number for the log-sum-exp, which `supports` refuses to give."""
        options = options_of(terms.mask)
        out = jax.nn.dot_product_attention(
            q, k, v, scale=terms.scale, implementation="cudnn", **(options or {})
        )
        batch, queries, heads, _ = q.shape
        return out, jnp.full((batch, heads, queries), jnp.nan, accumulation_dtype(q.dtype))


def widest() -> int:
    """The widest heads that it has on the first device: 256 from Hopper on, 128 before."""
    capability = str(getattr(jax.devices()[0], "compute_capability", "9.0"))
    return 256 if int(capability.split(".")[0]) >= 9 else 128


def options_of(mask: Mask) -> dict[str, Any] | None:
    """The mask in the words of `jax.nn.dot_product_attention`, for square attention; None if it has none."""
    match mask:
        case Full():
            return {}
        case Causal(offset=int(offset)) if offset == 0:
            return {"is_causal": True}
        case Window(left=left, right=0, offset=int(offset)) if offset == 0:
            return {"is_causal": True} | ({} if left is None else {"local_window_size": (left, 0)})
        case (
            And(parts=(Causal() as causal, Window(left=int(left)) as window))
            | And(parts=(Window(left=int(left)) as window, Causal() as causal))
        ) if options_of(causal) and isinstance(window.offset, int) and window.offset == 0:
            return {"is_causal": True, "local_window_size": (left, 0)}
        case _:
            return None
