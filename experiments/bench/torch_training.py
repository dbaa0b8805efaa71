"""The PyTorch decoder's training loop as a contender, eager or compiled."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from .job import DecoderJob
from .torch_decoder import Decoder, next_token_loss
from .tuning_job import TuningJob


class TorchTraining:
    """A decoder, its loss (compiled or not) and PyTorch's fused AdamW."""

    def __init__(self, job: DecoderJob, compiled: bool) -> None:
        self.versions = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
        torch.manual_seed(0)
        self.batches = itertools.cycle(
            (torch.from_numpy(x).long(), torch.from_numpy(y).long()) for x, y in job.batches()
        )
        self.model, self.clip = Decoder(job), job.clip
        self.optimizer = make_optimizer(job, list(self.model.parameters()))
        self.loss = torch.compile(next_token_loss) if compiled else next_token_loss

    def run(self, steps: int) -> float:
        """Train for `steps`; the last one's loss."""
        loss = torch.tensor(0.0)
        for _ in range(steps):
            loss = self.loss(self.model, *next(self.batches))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
        return loss.item()

    def product(self, m: int, k: int, n: int) -> Callable[[], None]:
        """One product `[m, k] x [k, n]` of random float32 matrices."""
        return torch_product(m, k, n)


def torch_product(m: int, k: int, n: int) -> Callable[[], None]:
    """A function that multiplies random float32 matrices `[m, k] x [k, n]`."""
    left, right = torch.randn(m, k), torch.randn(k, n)

    def once() -> None:
        left @ right

    return once


def make_optimizer(job: DecoderJob | TuningJob, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The job's AdamW in PyTorch's fused form, with weight decay on matrices and tables only."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": job.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, job.learning_rate, job.betas, job.epsilon, fused=True)
