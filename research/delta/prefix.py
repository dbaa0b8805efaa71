"""Prefix tuning: learned keys and values beside an attention's own (Li and Liang, 2021, arXiv 2101.00190)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ... import InputError
from ...models.kernels import Full, attention
from .bottleneck import require_positive
from .methods import Site, SiteMethod, Variables


@dataclass(frozen=True)
class Prefix(SiteMethod):
    """`length` learned keys and values `[n, G, K]` in front of those of an attention layer.

    Every query sees them, whatever its mask, window, bias (theirs is 0) or cache; soft cap and scale are the
    layer's own. They are not rotated: PEFT and OpenDelta give them as past keys too. Attention to them is
    computed apart and weighed in by log-sum-exp, which is exact, so that any kernel serves and nothing is
    padded. They start from N(0, `std`), 1 in both libraries, so the model does not start where it was.

    `reparameterise` is the width of the paper's MLP, embedding -> linear -> tanh -> linear, that makes them
    in training (0: none); `folded` gives the plain keys and values that it makes. Each layer has an MLP of
    its own, where the paper's layers share all but the last map. Default position: self-attention.
    """

    length: int = 6
    reparameterise: int = 0
    std: float = 1.0

    name: ClassVar[str] = "prefix"
    positions: ClassVar[tuple[str, ...]] = ("attention",)
    at: ClassVar[str] = "attend"

    def __post_init__(self) -> None:
        require_positive("prefix", length=self.length)
        if self.reparameterise < 0 or self.std < 0:
            raise InputError(
                f"prefix reparameterise={self.reparameterise} and std={self.std} must be at least 0"
            )

    def init(self, rng: jax.Array, site: Site, args: tuple, output: Any) -> Variables:
        """`key` and `value`, or the MLP that makes them; raises `InputError` at other attention than ours."""
        if not hasattr(site.module, "choice") or len(args) < 3:
            raise InputError(
                f"{site.path}: a prefix needs attend(query, key, value, mask, bias) as our attention has, "
                f"not of {type(site.module).__name__}"
            )
        return self.start(rng, *(each.shape[2:] for each in args[1:3]))

    def state(self, rng: jax.Array, site: Site, args: tuple, output: Any, trained: Variables) -> Variables:
        """`on` is 1; 0, as in layers outside the address of a scan, hides the prefix."""
        return {"on": jnp.ones(())}

    def start(self, rng: jax.Array, key: tuple[int, ...], value: tuple[int, ...]) -> Variables:
        """The trained variables for one layer's keys and values of these shapes `(G, K)`."""
        first, second, third, fourth = jax.random.split(rng, 4)
        if not self.reparameterise:
            return {
                "key": self.std * jax.random.normal(first, (self.length, *key)),
                "value": self.std * jax.random.normal(second, (self.length, *value)),
            }
        width = self.reparameterise
        bound = width**-0.5

        def uniform(rng: jax.Array, *shape: int) -> jax.Array:
            return jax.random.uniform(rng, shape, minval=-bound, maxval=bound)

        return {
            "embedding": self.std * jax.random.normal(first, (self.length, width)),
            "down_kernel": uniform(second, width, width),
            "down_bias": jnp.zeros(width),
            "key_kernel": uniform(third, width, *key),
            "key_bias": jnp.zeros(key),
            "value_kernel": uniform(fourth, width, *value),
            "value_bias": jnp.zeros(value),
        }

    def keys_and_values(self, variables: Variables) -> tuple[jax.Array, jax.Array]:
        """Both `[n, G, K]`, made by the MLP where there is one; stacked layers keep their leading axes."""
        if not self.reparameterise:
            return variables["key"], variables["value"]
        hidden = variables["embedding"] @ variables["down_kernel"] + variables["down_bias"][..., None, :]
        hidden = jnp.tanh(hidden)
        key, value = (
            jnp.einsum("...nm,...mgk->...ngk", hidden, variables[f"{name}_kernel"])
            + variables[f"{name}_bias"][..., None, :, :]
            for name in ("key", "value")
        )
        return key, value

    def apply(
        self, variables: Variables, site: Site, call: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        """Attention to the own and the learned keys, `[B, T, H, K]`, with log-sum-exp where asked for."""
        query, choice = args[0], site.module.choice
        own, own_lse = call(*args, **{**kwargs, "return_lse": True})
        key, value = (
            jnp.broadcast_to(each.astype(query.dtype), (query.shape[0], *each.shape))
            for each in self.keys_and_values(variables)
        )
        learned, lse = attention(
            query,
            key,
            value,
            mask=Full(),
            scale=choice.scale or None,
            soft_cap=choice.soft_cap or None,
            impl="reference",
            return_lse=True,
        )
        # The share of all weight that falls on the prefix. A query that sees no key of its own, at padding,
        # has log-sum-exp -inf and takes all from the prefix: finite, and nobody looks at it.
        on = variables["on"].astype(lse.dtype)
        share = on * jax.nn.sigmoid(lse - own_lse).swapaxes(1, 2)[..., None]
        out = (own + share * (learned.astype(lse.dtype) - own)).astype(own.dtype)
        if not kwargs.get("return_lse", False):
            return out
        return out, jnp.where(on > 0, jnp.logaddexp(own_lse, lse), own_lse)

    def folded(self, variables: Variables) -> tuple[Prefix, Variables]:
        """The same without the MLP: the method and its variables, state included."""
        key, value = self.keys_and_values(variables)
        return replace(self, reparameterise=0), {"key": key, "value": value, "on": variables["on"]}
