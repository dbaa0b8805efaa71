"""Our delta tuning as a contender: the library's model, delta, objective, optimizer and step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from ...models.heads import ClassifierHead
from ...models.pretrained import load_pretrained
from ...models.transformer import Transformer
from ...research.delta import BitFit, Full, LoRA, Spec, attach
from ...research.training.objectives import classification, delta_tuning, full_tuning
from ...research.training.optimizers import make_optimizer
from ...research.training.state import TrainState, create_state
from ...research.training.step import make_train_step
from .ours import adamw, product
from .tuning_job import LABELS, TuningJob

HEAD = {"classifier/kernel": Full(), "classifier/bias": Full()}


class OurTuning:
    """A train state and the compiled step, its state donated, as the training loop runs it.

    `narrow`: the last mlp computes the token that the classifier reads, as in `modicum tune`.
    """

    def __init__(self, job: TuningJob, narrow: bool = True) -> None:
        self.versions = f"jax {jax.__version__}"
        self.batches = itertools.cycle(
            {"tokens": jnp.asarray(x), "label": jnp.asarray(y), "weight": jnp.ones(y.shape, jnp.float32)}
            for x, y in job.batches()
        )
        self.job, optimizer = job, make_optimizer(adamw(job), steps=1)
        model, params = load_classifier(job, narrow)
        trainable, self.frozen, self.loss = self._prepared(model, params)
        self.state: TrainState = create_state(trainable, optimizer)
        self.step = jax.jit(make_train_step(self.loss, optimizer), donate_argnums=0)

    def _prepared(self, model: Transformer, params: Any) -> tuple[Any, Any, Any]:
        """What is trained, what is frozen, and the loss."""
        if self.job.method == "full":
            return params, {}, classification(full_tuning(model))
        tuned = attach(model, specification(self.job))
        tokens = self.job.batches()[0][0][:1]
        variables = tuned.init(jax.random.key(0), params, tokens)
        trainable = variables["delta"]
        if self.job.method == "lora":
            for layer, pair in enumerate(self.job.down_projections()):
                for site, a in zip(("query", "value"), pair):
                    trainable[f"layers_{layer}"]["attention"][site]["~lora"]["a"] = jnp.asarray(a)
        frozen = {"params": params, "delta_state": variables["delta_state"]}
        return trainable, frozen, classification(delta_tuning(tuned))

    def run(self, steps: int) -> float:
        """Train for `steps` and wait for the last one's loss."""
        metrics: Any = {}
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.frozen, next(self.batches))
        jax.block_until_ready(self.state)
        return float(metrics["loss"])

    def product(self, m: int, k: int, n: int) -> Callable[[], None]:
        """One product `[m, k] x [k, n]` of random float32 matrices."""
        return product(m, k, n)


def specification(job: TuningJob) -> Spec:
    """The job's method, with the classifier trained beside it."""
    if job.method == "lora":
        return {"attention/(query|value)": LoRA(job.rank, job.alpha), **HEAD}
    return {"": BitFit(), "classifier/kernel": Full()}


def load_classifier(job: TuningJob, narrow: bool) -> tuple[Transformer, Any]:
    """The checkpoint's body and pooler under the job's classifier, without dropout."""
    loaded = load_pretrained(job.checkpoint)
    config = replace(loaded.model.config, dropout=0.0)
    model = Transformer(config, ClassifierHead(LABELS, "first", pooler="tanh", narrow=narrow))
    body = {**loaded.params}
    head = {"pooler": body.pop("pooler"), "kernel": jnp.asarray(job.classifier()), "bias": jnp.zeros(LABELS)}
    return model, {**body, "classifier": head}
