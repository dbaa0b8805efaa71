"""PEFT's tuning of transformers' model as a contender: the same weights, rows, start and optimizer."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from .torch_training import TorchSteps
from .tuning_job import LABELS, TuningJob


class TorchTuning(TorchSteps):
    """`BertForSequenceClassification`, under LoRA PEFT's, and PyTorch's fused AdamW."""

    def __init__(self, job: TuningJob, compiled: bool) -> None:
        import peft

        super().__init__(job, tuned_model(job), batch_loss, compiled)
        self.versions = f"peft {peft.__version__}, {self.versions}"


def batch_loss(model: nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of `labels [B]` for `tokens [B, T]`; without a mask nothing is padding."""
    return nn.functional.cross_entropy(model(input_ids=tokens).logits, labels)


def tuned_model(job: TuningJob) -> nn.Module:
    """The model with what the method trains, and nothing else, asking for gradients."""
    model = AutoModelForSequenceClassification.from_pretrained(
        job.checkpoint, num_labels=LABELS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ).float()
    with torch.no_grad():
        model.classifier.weight.copy_(torch.from_numpy(job.classifier()).T)
        model.classifier.bias.zero_()
    if job.method == "bitfit":  # PEFT has none; this is what its users write
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias") or name.startswith("classifier."))
    return (with_lora(model, job) if job.method == "lora" else model).train()


def with_lora(model: Any, job: TuningJob) -> nn.Module:
    """PEFT's LoRA on query and value, started at the job's numbers; the classifier is trained too."""
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=job.rank,
        lora_alpha=job.alpha,
        lora_dropout=0.0,
        target_modules=["query", "value"],
    )
    tuned: Any = get_peft_model(model, config)
    with torch.no_grad():
        for layer, pair in zip(tuned.base_model.model.bert.encoder.layer, job.down_projections()):
            for name, a in zip(("query", "value"), pair):
                site = getattr(layer.attention.self, name)
                site.lora_A["default"].weight.copy_(torch.from_numpy(a).T)
    return tuned
