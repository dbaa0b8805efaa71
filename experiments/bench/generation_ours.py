"""Our generation as a contender: `load_pretrained` and `generate`, and nothing beside."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ...models.generation import generate
from ...models.pretrained import load_pretrained
from .generation_job import MATRIX, GenerationJob


class OurGeneration:
    """The checkpoint in float32, its programs compiled when first used."""

    def __init__(self, job: GenerationJob) -> None:
        self.versions = f"jax {jax.__version__}"
        self.job = job
        pretrained = load_pretrained(job.folder)
        self.model, self.params = pretrained.model, pretrained.params

    def generate(self, batch: int, new: int) -> np.ndarray:
        """`new` greedy tokens for each prompt, int `[batch, new]`."""
        prompts = self.job.prompts(batch)
        return generate(self.model, self.params, prompts, max_new_tokens=new).tokens

    def matrix_vector(self) -> Callable[[], None]:
        """A function that multiplies a large matrix by a vector and waits for it."""
        matrix, vector = jnp.ones(MATRIX, jnp.float32), jnp.ones(MATRIX[1], jnp.float32)
        product = jax.jit(lambda a, b: a @ b)

        def once() -> None:
            jax.block_until_ready(product(matrix, vector))

        return once
