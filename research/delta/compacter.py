"""Compacter: an adapter whose matrices are sums of Kronecker products (Karimi Mahabadi et al., 2021).

arXiv 2106.04647; the products are the parameterised hypercomplex multiplication of
Zhang et al. (2021, arXiv 2102.08597).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ... import InputError
from .bottleneck import (
    ACTIVATIONS,
    features_of,
    first_of,
    require_activation,
    require_positive,
    scale_some,
    with_first,
)
from .methods import Site, SiteMethod, Variables

RULE_STD = 0.01  # OpenDelta's start of C


@dataclass(frozen=True)
class Compacter(SiteMethod):
    """An adapter of `D / reduction` units whose matrices are `sum_i C_i (x) (left_i @ right_i)`, i = 1..n.

    The rules `C [n, n, n]` multiply blocks, the factors of `rank` their contents. `shared_rule` gives both
    matrices one C. Where not `learn_rule`, C is drawn once for all sites and stays as it is; a trained C is
    the site's own, where the paper's is one for all layers. Defaults and positions are OpenDelta's, and so is
    the start, C ~ N(0, 0.01) and Glorot-uniform factors with gain sqrt(2); but the right factors of the
    second matrix and the biases are zero, so the model starts exactly where it was.
    """

    reduction: int = 16
    n: int = 4
    rank: int = 1
    activation: str = "gelu"
    shared_rule: bool = False
    learn_rule: bool = True

    name: ClassVar[str] = "compacter"
    positions: ClassVar[tuple[str, ...]] = ("attention/output", "mlp/down")

    def __post_init__(self) -> None:
        require_positive("compacter", reduction=self.reduction, n=self.n, rank=self.rank)
        require_activation("compacter", self.activation)

    @property
    def rules(self) -> tuple[str, ...]:
        """The names of the C that there are."""
        return ("rule",) if self.shared_rule else ("down_rule", "up_rule")

    def init(self, rng: jax.Array, site: Site, args: tuple, output: Any) -> Variables:
        """Factors, biases and, if learned, rules; raises `InputError` where n does not divide the sizes."""
        size = features_of(site, first_of(output), "a compacter")
        width = size // self.reduction
        for what, count in (("features", size), ("units", width)):
            if count % self.n or not count:
                raise InputError(
                    f"{site.path}: a compacter's n={self.n} must divide its {count} {what} "
                    f"({size} features, reduction={self.reduction})"
                )
        glorot = jax.nn.initializers.variance_scaling(2.0, "fan_avg", "uniform", batch_axis=0)
        keys, inner, outer = jax.random.split(rng, 4), width // self.n, size // self.n
        return {
            **(_rules(keys[0], self.rules, self.n) if self.learn_rule else {}),
            "down_left": glorot(keys[1], (self.n, outer, self.rank)),
            "down_right": glorot(keys[2], (self.n, self.rank, inner)),
            "down_bias": jnp.zeros(width),
            "up_left": glorot(keys[3], (self.n, inner, self.rank)),
            "up_right": jnp.zeros((self.n, self.rank, outer)),
            "up_bias": jnp.zeros(size),
        }

    def state(self, rng: jax.Array, site: Site, args: tuple, output: Any, trained: Variables) -> Variables:
        """The rules that are not learned: the same numbers at every site, whatever the seed."""
        return {} if self.learn_rule else _rules(jax.random.key(0), self.rules, self.n)

    def apply(
        self, variables: Variables, site: Site, call: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        """The adapted output, computed in the output's dtype; no Kronecker product is formed."""
        output = call(*args, **kwargs)
        y = first_of(output)
        cast = {key: value.astype(y.dtype) for key, value in variables.items()}
        down, up = cast[self.rules[0]], cast[self.rules[-1]]
        hidden = kronecker_product(y, down, cast["down_left"], cast["down_right"]) + cast["down_bias"]
        hidden = ACTIVATIONS[self.activation](hidden)
        added = kronecker_product(hidden, up, cast["up_left"], cast["up_right"]) + cast["up_bias"]
        return with_first(output, y + added)

    def scaled(self, variables: Variables, factor: Any) -> Variables:
        """What is added, `factor` times."""
        return scale_some(variables, ("up_right", "up_bias"), factor)


def kronecker_product(x: jax.Array, rule: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """`x [..., n p] @ sum_i kron(rule[i], left[i] @ right[i])`, `[..., n q]`.

    `rule [n, n, n]`, `left [n, p, r]`, `right [n, r, q]`.
    """
    blocks = x.reshape(*x.shape[:-1], rule.shape[1], left.shape[1])
    inner = jnp.einsum("...ap,ipr->...air", blocks, left)
    mixed = jnp.einsum("...air,iab->...bir", inner, rule)
    made = jnp.einsum("...bir,irq->...bq", mixed, right)
    return made.reshape(*x.shape[:-1], -1)


def _rules(rng: jax.Array, names: tuple[str, ...], n: int) -> dict[str, jax.Array]:
    keys = jax.random.split(rng, len(names))
    return {name: RULE_STD * jax.random.normal(key, (n, n, n)) for name, key in zip(names, keys)}
