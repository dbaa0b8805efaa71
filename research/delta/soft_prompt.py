"""Prompt tuning: learned vectors in front of the embedded tokens (Lester et al., 2021, arXiv 2104.08691)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ... import InputError
from ...models.config import TransformerConfig
from ...models.embedding import Embedding
from .input_prompt import InputPrompt
from .methods import Site, Variables
from .trees import node_at

INITIALISATIONS = "vocabulary", "uniform"
RANGE = 0.5  # half the width of the uniform start (the paper, section 3.2; OpenDelta)


@dataclass(frozen=True)
class SoftPrompt(InputPrompt):
    """The vectors of `InputPrompt` are themselves trained: `prompt [n, D]`.

    They start as the model's own vectors of `tokens`, repeated as often as needed (not given: the first n of
    the vocabulary, as in OpenDelta), or uniform in ±0.5. The model does not start where it was. Length 100
    as in the paper and in OpenDelta; learning rates that suit it are 10 to 100 times those of LoRA.
    """

    initialisation: str = "vocabulary"
    tokens: tuple[int, ...] = ()

    name: ClassVar[str] = "soft_prompt"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "tokens", tuple(self.tokens))  # a stored method has a list here
        if self.initialisation not in INITIALISATIONS:
            raise InputError(
                f"soft_prompt initialisation={self.initialisation!r} is not one of "
                f"{', '.join(INITIALISATIONS)}"
            )
        if self.tokens and self.initialisation != "vocabulary":
            raise InputError("soft_prompt tokens= are for initialisation='vocabulary'; leave one of them out")

    def init(self, rng: jax.Array, site: Site, args: tuple, output: Any) -> Variables:
        """The vectors; raises `InputError` for tokens that the vocabulary has not."""
        table = self.table(site, args)
        if self.initialisation == "uniform":
            shape = self.length, table.shape[1]
            return {"prompt": jax.random.uniform(rng, shape, minval=-RANGE, maxval=RANGE)}
        if wrong := [token for token in self.tokens if not 0 <= token < table.shape[0]]:
            raise InputError(f"soft_prompt tokens={wrong[0]} is not in the vocabulary of {table.shape[0]}")
        chosen = self.tokens or range(min(self.length, table.shape[0]))
        vectors = self._words(site, table, np.resize(np.asarray(chosen, np.int32), self.length))
        return {"prompt": vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))}

    def prompt(self, variables: Variables) -> jax.Array:
        """The vectors as they are."""
        return variables["prompt"]

    def _words(self, site: Site, table: jax.Array, tokens: np.ndarray) -> jax.Array:
        """What the model's embedding makes of `tokens [n]`; ours also scales them."""
        config = getattr(site.module, "config", None)
        if isinstance(config, TransformerConfig) and self.embed == "embedding":
            own = {"params": node_at(site.params, self.embed)}
            return jnp.asarray(Embedding(config).apply(own, tokens))
        return jnp.asarray(table)[tokens]
