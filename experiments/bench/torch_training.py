"""The PyTorch decoder's training loop as a contender, eager or compiled."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from .job import DecoderJob
from .torch_decoder import Decoder, next_token_loss
from .tuning_job import TuningJob

Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


class TorchSteps:
    """A model, its loss (compiled or not) and PyTorch's fused AdamW on what asks for gradients."""

    def __init__(self, job: DecoderJob | TuningJob, model: nn.Module, loss: Loss, compiled: bool) -> None:
        self.versions = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
        self.batches = itertools.cycle(
            (torch.from_numpy(x).long(), torch.from_numpy(y).long()) for x, y in job.batches()
        )
        self.model, self.clip = model, job.clip
        self.trained = [each for each in model.parameters() if each.requires_grad]
        self.optimizer = make_optimizer(job, self.trained)
        self.loss = torch.compile(loss) if compiled else loss

    def run(self, steps: int) -> float:
        """Train for `steps`; the last one's loss."""
        loss = torch.tensor(0.0)
        for _ in range(steps):
            loss = self.loss(self.model, *next(self.batches))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.trained, self.clip)
            self.optimizer.step()
        return loss.item()

    def product(self, m: int, k: int, n: int) -> Callable[[], None]:
        """One product `[m, k] x [k, n]` of random float32 matrices."""
        return torch_product(m, k, n)


class TorchTraining(TorchSteps):
    """A decoder and its next-token loss."""

    def __init__(self, job: DecoderJob, compiled: bool) -> None:
        torch.manual_seed(0)
        super().__init__(job, Decoder(job), next_token_loss, compiled)


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
