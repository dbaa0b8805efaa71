"""Learned vectors in front of a model's embedded tokens: what prompt tuning and P-tuning share.

Acts at the root: tokens and what goes with them get n places more, and the embedding module's first n rows
are replaced inside the call, so positions, norms and masks treat a prompt like words.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from ... import InputError
from .bottleneck import require_positive
from .methods import Site, SiteMethod, Variables
from .sites import changed_output
from .trees import node_at

SEGMENTS = "segments", "attention_mask"
TYPES = "token_types", "token_type_ids"
POSITIONS = "positions", "position_ids"


@dataclass(frozen=True)
class InputPrompt(SiteMethod):
    """`length` n vectors before the embedded tokens `[B, T, D]` of a model called as `model(tokens, ...)`.

    Segments and attention masks `[B, T]` begin with the row's first segment, token types with 0; positions
    given by the caller move up by n. Outputs `[B, n + T, ...]` of three axes or more lose the prompt's part,
    others (`[B, labels]`) stay. In an encoder-decoder the encoder reads it, as in PEFT. An empty cache
    grows by n slots, which the first call fills; later calls find the prompt there. `embed` is the path of
    the module that embeds tokens. No `mask=` can be given: who is to see the prompt would be a guess.
    """

    length: int = 100
    embed: str = "embedding"

    positions: ClassVar[tuple[str, ...]] = ("",)
    reads: ClassVar[bool] = True
    neutral: ClassVar[float] = float("nan")  # no numbers switch a prompt off

    def __post_init__(self) -> None:
        require_positive(self.name, length=self.length)

    @abstractmethod
    def prompt(self, variables: Variables) -> jax.Array:
        """The vectors `[n, D]`."""

    def table(self, site: Site, args: tuple) -> jax.Array:
        """The matrix `[V, D]` of the embedding; raises `InputError` where the site is no whole model."""
        where = site.path or "the root module"
        tokens: Any = args[0] if args else None
        if getattr(tokens, "ndim", 0) != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise InputError(f"{where}: {type(self).__name__} needs a model that takes tokens [B, T] first")
        leaves = [leaf for leaf in jax.tree.leaves(node_at(site.params, self.embed)) if leaf.ndim == 2]
        if len(leaves) != 1:
            raise InputError(
                f"{where}: {type(self).__name__} embed={self.embed!r} names {len(leaves)} matrices [V, D]; "
                f"it must be the path of the module that embeds tokens"
            )
        return leaves[0]

    def apply(
        self, variables: Variables, site: Site, call: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        """The model's output for the tokens after the prompt; `InputError` for what cannot be padded."""
        name = None if args else _first_parameter(site.module)
        tokens = kwargs[name] if name else args[0]
        cache = kwargs.get("cache")
        if tokens is None or ("decoder_tokens" not in kwargs and cache is not None and not cache.fresh):
            return call(*args, **self._moved(kwargs))
        if len(args) > 1 and any(_per_token(each, tokens) for each in args[1:]):
            raise InputError(f"{type(self).__name__}: give the model's inputs beside tokens by keyword")
        padded = self._in_front(tokens, 0)
        kwargs = {key: self._padded(key, value, tokens) for key, value in kwargs.items() if key != name}
        args = (padded, *args[1:]) if name is None else ()
        kwargs = kwargs if name is None else {name: padded, **kwargs}
        if cache is not None and "decoder_tokens" not in kwargs:
            room = jnp.pad(cache.segments, ((0, 0), (0, self.length)))
            kwargs["cache"] = cache.replace(segments=room)
        with changed_output(site.module, self.embed, partial(self._begun, self.prompt(variables))):
            output = call(*args, **kwargs)
        if "decoder_tokens" in kwargs:
            return output
        if cache is not None:
            return self._stripped(output[0], padded.shape[1]), output[1]
        return self._stripped(output, padded.shape[1])

    def _begun(self, prompt: jax.Array, y: jax.Array) -> jax.Array:
        """Embedded tokens `y [B, n + T, D]` that begin with the prompt."""
        rows = jnp.broadcast_to(prompt.astype(y.dtype), (y.shape[0], *prompt.shape))
        return jnp.concatenate([rows, y[:, self.length :]], 1)

    def _padded(self, name: str, value: Any, tokens: jax.Array) -> Any:
        """An argument of the model beside its tokens, with room for the prompt."""
        if value is None or name.startswith("decoder_"):
            return value
        if name in POSITIONS:
            return self._in_front(self._shifted(value), jnp.arange(self.length))
        if name in SEGMENTS:
            at = jnp.argmax(value > 0, 1, keepdims=True)
            first = jnp.take_along_axis(jnp.asarray(value), at, 1)
            return self._in_front(value, jnp.maximum(first, 1))
        if name in TYPES:
            return self._in_front(value, 0)
        if name == "mask" or (name != "cache" and _per_token(value, tokens)):
            raise InputError(f"{type(self).__name__} cannot make room for its prompt in the argument {name}=")
        return value

    def _moved(self, kwargs: dict) -> dict:
        """Arguments of a call whose cache holds the prompt already."""
        return {
            key: self._shifted(value) if key in POSITIONS and value is not None else value
            for key, value in kwargs.items()
        }

    def _shifted(self, positions: Any) -> Any:
        if not hasattr(positions, "shape"):
            raise InputError(
                f"{type(self).__name__} needs positions [B, T]; this model's are of another kind"
            )
        return positions + self.length

    def _in_front(self, x: jax.Array, value: jax.Array | int) -> jax.Array:
        """`x [B, T]` with n places before it that hold `value`."""
        x = jnp.asarray(x)
        new = jnp.broadcast_to(value, (x.shape[0], self.length)).astype(x.dtype)
        return jnp.concatenate([new, x], 1)

    def _stripped(self, outputs: Any, length: int) -> Any:
        """Outputs without those of the prompt, where they have an axis over tokens."""

        def strip(y: Any) -> Any:
            timed = getattr(y, "ndim", 0) >= 3 and y.shape[1] == length
            return y[:, self.length :] if timed else y

        return jax.tree.map(strip, outputs)


def _first_parameter(module: nn.Module) -> str:
    """What the module calls its first input."""
    return list(inspect.signature(type(module).__call__).parameters)[1]


def _per_token(value: Any, tokens: Any) -> bool:
    """Whether an argument holds something for each token."""
    return any(jnp.shape(leaf)[:2] == tokens.shape for leaf in jax.tree.leaves(value))
