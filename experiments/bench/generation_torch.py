"""Hugging Face transformers' `generate` as a contender, eager PyTorch with its default cache."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import transformers

from .generation_job import MATRIX, GenerationJob


class TransformersGeneration:
    """The checkpoint in float32, in evaluation mode, without gradients."""

    def __init__(self, job: GenerationJob) -> None:
        threads = torch.get_num_threads()
        self.versions = (
            f"transformers {transformers.__version__}, torch {torch.__version__}, {threads} threads"
        )
        self.job = job
        torch.set_grad_enabled(False)
        transformers.logging.set_verbosity_error()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.float32).eval()

    def generate(self, batch: int, new: int) -> np.ndarray:
        """`new` greedy tokens for each prompt, int `[batch, new]`."""
        prompts = torch.from_numpy(self.job.prompts(batch)).long()
        made = self.model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            min_new_tokens=new,
            max_new_tokens=new,
            pad_token_id=0,
            eos_token_id=None,
        )
        return made[:, prompts.shape[1] :].numpy()

    def matrix_vector(self) -> Callable[[], None]:
        """A function that multiplies a large matrix by a vector and waits for it."""
        matrix, vector = torch.ones(MATRIX), torch.ones(MATRIX[1])

        def once() -> None:
            matrix @ vector

        return once
