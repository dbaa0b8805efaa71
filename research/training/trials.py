"""Many short trainings of one classifier through one compiled step: rate, seed and data are arguments.

    trials = Trials.compile(model, params, spec, example, TrainingConfig(steps=200))
    trial = trials.start(seed=0, rate=1e-3)
    trial = trials.advance(trial, Batches(rows, 16, seed=0), stop=200)
    scores = trials.score(trial, evaluation_rows)

For comparisons of methods, where compiling and starting would cost more than the training. No checkpoints: a
trial takes seconds or minutes; `loop.train` is for what takes longer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ...models.losses import cross_entropy
from ...models.model import Params
from ...models.transformer import Transformer
from ..data.batches import Batches, Rows, evaluation_batches
from ..delta import Spec, Tuned, attach
from .config import TrainingConfig
from .job import Wrap
from .memory import CompiledMemory, compiled_memory
from .objectives import Forward, classification, delta_tuning, full_tuning, inputs_of, penalised
from .optimizers import make_optimizer
from .rates import set_rate, with_rate_argument
from .state import TrainState, create_state
from .step import make_train_step

Tree = Any
HEAD = "classifier"


class Trial(NamedTuple):
    """A training under way: what changes, and what its seed decided and stays."""

    state: TrainState
    frozen: Tree

    @property
    def variables(self) -> dict[str, Tree]:
        """The delta's variables, as `Tuned` takes them."""
        return {"delta": self.state.trainable, "delta_state": self.frozen.get("delta_state", {})}


class Scores(NamedTuple):
    """What a trial says of each row `[N]`: the label it holds likeliest, and the loss in nats."""

    chosen: np.ndarray
    losses: np.ndarray


@dataclass(frozen=True)
class Trials:
    """The compiled functions of one model with one specification (`tuned` None: full tuning)."""

    model: Transformer
    params: Params
    tuned: Tuned | None
    create: Any
    step: jax.stages.Compiled
    judge: Any
    memory: CompiledMemory | None

    @classmethod
    def compile(
        cls,
        model: Transformer,
        params: Params,
        spec: Spec | None,
        example: Mapping[str, np.ndarray],
        config: TrainingConfig,
        wrap: Wrap | None = None,
    ) -> Trials:
        """Trials of `config.steps` steps on batches shaped like `example`; the rate in `config` is ignored.

        `wrap(optimizer, steps)` is the optimizer with what a method adds to it.
        Each seed draws a new classifier head, N(0, initial_std) and no bias, and a new delta.
        """
        tuned = None if spec is None else attach(model, spec)
        forward = full_tuning(model) if tuned is None else delta_tuning(tuned)
        loss = classification(forward) if tuned is None else penalised(classification(forward), tuned)
        unit = replace(config.optimizer, learning_rate=1.0)
        optimizer = with_rate_argument(make_optimizer(unit, config.steps))
        optimizer = optimizer if wrap is None else wrap(optimizer, config.steps)

        def create(params: Params, seed: jax.Array, rate: jax.Array) -> tuple[TrainState, Tree]:
            first, second = jax.random.split(jax.random.key(seed))
            params = _with_new_head(params, first, model.config.initial_std)
            trainable, frozen = _begin(tuned, second, params, example)
            state = set_rate(create_state(trainable, optimizer), rate)
            return replace(state, seed=jnp.asarray(seed, jnp.uint32)), frozen

        step = jax.jit(make_train_step(loss, optimizer, accumulate=config.accumulate), donate_argnums=0)
        seed, rate = jnp.uint32(0), jnp.float32(0)
        state, small = jax.eval_shape(create, params, seed, rate)
        frozen = _whole(small, params, tuned)
        compiled = step.lower(state, frozen, dict(example)).compile()
        judge = jax.jit(partial(_judge, forward))
        return cls(model, params, tuned, jax.jit(create), compiled, judge, compiled_memory(compiled))

    def start(self, seed: int, rate: float) -> Trial:
        """A trial before its first step."""
        state, small = self.create(self.params, jnp.uint32(seed), jnp.float32(rate))
        return Trial(state, _whole(small, self.params, self.tuned))

    def advance(self, trial: Trial, batches: Batches, stop: int) -> Trial:
        """The trial trained up to step `stop`, on `batches[step]`; its arrays are used up."""
        state, start = trial.state, int(trial.state.step)
        for batch in islice(batches.iterate(start), stop - start):
            state, _ = self.step(state, trial.frozen, batch)
        return trial._replace(state=state)

    def score(self, trial: Trial, rows: Rows, batch: int = 64) -> Scores:
        """What the trial's model says of all `rows`."""
        return _scores(partial(self.judge, trial.state.trainable, trial.frozen), rows, batch)

    def score_merged(self, params: Params, rows: Rows, batch: int = 64) -> Scores:
        """What the plain model with these parameters says of all `rows`."""
        return _scores(partial(self._judge_plain, params, {}), rows, batch)

    @cached_property
    def _judge_plain(self) -> Any:
        return jax.jit(partial(_judge, full_tuning(self.model)))


def _scores(judge: Callable[..., Any], rows: Rows, batch: int) -> Scores:
    found = [jax.device_get(judge(each)) for each in evaluation_batches(rows, batch)]
    chosen, losses = (np.concatenate(part)[: len(rows)] for part in zip(*found))
    return Scores(chosen, losses)


def _begin(tuned: Tuned | None, rng: jax.Array, params: Params, example: Mapping[str, Any]) -> tuple:
    """What is trained, and what beside the backbone is not."""
    if tuned is None:
        return params, {}
    variables = tuned.init(rng, params, example["tokens"], **inputs_of(example))
    return variables["delta"], {HEAD: params[HEAD], "delta_state": variables["delta_state"]}


def _whole(small: Tree, params: Params, tuned: Tuned | None) -> Tree:
    """What a step takes as frozen: the backbone is shared by all trials, the head is the trial's own."""
    if tuned is None:
        return {}
    return {"params": {**params, HEAD: small[HEAD]}, "delta_state": small["delta_state"]}


def _with_new_head(params: Params, rng: jax.Array, std: float) -> Params:
    kernel = params[HEAD]["kernel"]
    drawn = std * jax.random.normal(rng, kernel.shape, kernel.dtype)
    return {**params, HEAD: {**params[HEAD], "kernel": drawn, "bias": jnp.zeros_like(params[HEAD]["bias"])}}


def _judge(forward: Forward, trainable: Tree, frozen: Tree, batch: Any) -> tuple[jax.Array, jax.Array]:
    logits = forward(trainable, frozen, batch["tokens"], rng=None, train=False, **inputs_of(batch))
    return logits.argmax(-1), cross_entropy(logits, batch["label"])
