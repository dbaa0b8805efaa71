"""The loop: what is resumed, kept, stopped and reported."""

import json
import os
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import MLP, Transformer, TransformerConfig, multi_head
from modicum.models.precision import policy
from modicum.parallel.layout import Layout
from modicum.research.delta import LoRA, attach
from modicum.research.study.records import read_records
from modicum.research.study.runs import Run
from modicum.research.training.checkpoints import checkpoint_steps, load_arrays
from modicum.research.training.config import OptimizerConfig, ScheduleConfig, TrainingConfig
from modicum.research.training.job import Job
from modicum.research.training.loop import train
from modicum.research.training.loss_scale import NO_SCALING
from modicum.research.training.objectives import delta_tuning, full_tuning, language_modelling
from modicum.research.training.program import build_program
from modicum.research.training.state import TrainState
from modicum.research.training.stopping import NonFiniteLoss

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = TrainingConfig(
    steps=8,
    batch=4,
    optimizer=OptimizerConfig("adamw", 0.03, ScheduleConfig("constant", 0)),
    log_every=3,
    evaluate_every=4,
    checkpoint_every=2,
)


class Interrupted(Exception):
    """What a test throws into the middle of a run."""


@pytest.fixture
def run_in(tmp_path):
    def make(name="run", config=CONFIG):
        return Run.open(tmp_path, config, name=name)

    return make


def metrics_file(run):
    return (run.folder / "metrics.jsonl").read_bytes()


def losses(run):
    return [record["loss"] for record in read_records(run.folder / "metrics.jsonl") if "loss" in record]


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    """A finished run that others are compared with, and its outcome."""
    run = Run.open(tmp_path_factory.mktemp("uninterrupted"), CONFIG, name="run")
    return run, train(tiny.job_of(), CONFIG, run)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_run_records_every_step_and_its_evaluations(uninterrupted):
    run, outcome = uninterrupted
    records = read_records(run.folder / "metrics.jsonl")
    steps = [record["step"] for record in records if "loss" in record]
    assert steps == list(range(1, 9))
    evaluated = [(r["step"], r["evaluation_loss"]) for r in records if "evaluation_loss" in r]
    assert evaluated == [(each["step"], each["loss"]) for each in outcome.evaluations]
    assert [step for step, _ in evaluated] == [4, 8]
    assert outcome.stopped is None and int(outcome.state.step) == 8
    assert losses(run)[-1] < losses(run)[0]
    assert {"loss", "accuracy", "weight", "gradient_norm", "update_norm"} <= set(records[0])
    assert checkpoint_steps(run.checkpoints) == [6, 8]  # keep=2
    assert outcome.memory.arguments > 0


def test_a_run_without_a_folder_computes_the_same(uninterrupted, tiny):
    assert_same(train(tiny.job_of(), CONFIG).state, uninterrupted[1].state)


@pytest.mark.parametrize("stop_at", [1, 5, 6])
def test_an_interrupted_run_goes_on_bit_for_bit(stop_at, uninterrupted, run_in, tiny):
    """Step 1: nothing was stored. Step 5: between checkpoints. Step 6: the flush before one."""
    run = run_in()

    def interrupt(step, metrics):
        if step == stop_at:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(tiny.job_of(), CONFIG, run, report=interrupt)
    resumed_from = (checkpoint_steps(run.checkpoints) or [0])[-1]
    assert resumed_from == {1: 0, 5: 4, 6: 4}[stop_at]
    asked = []

    def batches(step):
        asked.append(step)
        return tiny.batch_of(step)

    outcome = train(tiny.job_of(batches=batches), CONFIG, run_in())
    reference, expected = uninterrupted
    assert sorted(set(asked) - {0}) == list(range(max(resumed_from, 1), 8))
    assert metrics_file(run) == metrics_file(reference)
    assert_same(outcome.state, expected.state)
    assert outcome.evaluations == expected.evaluations


def test_a_finished_run_is_not_trained_again(uninterrupted, tiny):
    run, expected = uninterrupted
    before = metrics_file(run)
    outcome = train(tiny.job_of(), CONFIG, run)
    assert metrics_file(run) == before
    assert_same(outcome.state, expected.state)
    assert outcome.evaluations == expected.evaluations


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_the_run_goes_on(number, uninterrupted, run_in, tiny):
    run = run_in()

    def batches(step):
        if step == 4:  # the batch of step 5, which is no step of a checkpoint
            os.kill(os.getpid(), number)
        return tiny.batch_of(step)

    outcome = train(tiny.job_of(batches=batches), CONFIG, run)
    assert outcome.stopped == number.name
    assert int(outcome.state.step) == checkpoint_steps(run.checkpoints)[-1] == 5
    assert len(losses(run)) == 5
    outcome = train(tiny.job_of(), CONFIG, run_in())
    assert outcome.stopped is None
    assert metrics_file(run) == metrics_file(uninterrupted[0])
    assert_same(outcome.state, uninterrupted[1].state)


def scripted(values):
    """An evaluation that returns `values` one after another."""
    left = iter(values)
    return lambda trainable, frozen: {"loss": next(left), "trainable": 0.0}


def test_the_best_checkpoint_survives(run_in, tiny):
    config = replace(CONFIG, steps=12, evaluate_every=2, keep=1)
    run = run_in(config=config)
    outcome = train(tiny.job_of(evaluate=scripted([3.0, 1.0, 2.0, 2.0, 2.0, 2.0])), config, run)
    assert checkpoint_steps(run.checkpoints) == [4, 12]
    assert int(outcome.best.step) == 4 and int(outcome.state.step) == 12
    stored = load_arrays(run.checkpoints, "trainable", step=4).state
    assert_same(stored, jax.device_get(outcome.best.trainable))


def test_the_largest_is_best_where_the_metric_says_so(run_in, tiny):
    config = replace(CONFIG, best_metric="+accuracy", evaluate_every=2, keep=1)
    values = iter([0.1, 0.9, 0.5, 0.7])
    run = run_in(config=config)
    job = tiny.job_of(evaluate=lambda trainable, frozen: {"loss": 1.0, "accuracy": next(values)})
    assert int(train(job, config, run).best.step) == 4


def test_what_is_not_settled_is_not_the_best(run_in, tiny):
    config = replace(CONFIG, steps=10, evaluate_every=2, keep=1, patience=1)
    job = replace(tiny.job_of(evaluate=scripted([1.0, 2.0, 9.0, 3.0, 4.0])), best_from=5)
    outcome = train(job, config, run_in(config=config))
    assert int(outcome.best.step) == 8 and int(outcome.state.step) == 10


def test_patience_stops_and_stays_stopped(run_in, tiny):
    config = replace(CONFIG, steps=20, evaluate_every=2, patience=2)
    run = run_in(config=config)
    outcome = train(tiny.job_of(evaluate=scripted([3.0, 1.0, 2.0, 1.5])), config, run)
    assert outcome.stopped == "no better loss for 2 evaluations"
    assert int(outcome.state.step) == 8 and int(outcome.best.step) == 4
    again = train(tiny.job_of(evaluate=scripted([])), config, run_in(config=config))
    assert again.stopped == outcome.stopped
    assert int(again.state.step) == 8 and again.evaluations == outcome.evaluations
    assert int(again.best.step) == 4


def test_patience_remembers_evaluations_from_before_an_interruption(run_in, tiny):
    config = replace(CONFIG, steps=20, evaluate_every=2, patience=2)

    def interrupt(step, metrics):
        if step == 7:
            raise Interrupted

    with pytest.raises(Interrupted):
        values = [3.0, 1.0, 2.0]
        train(tiny.job_of(evaluate=scripted(values)), config, run_in(config=config), report=interrupt)
    outcome = train(tiny.job_of(evaluate=scripted([1.5])), config, run_in(config=config))
    assert int(outcome.state.step) == 8 and outcome.stopped


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(log_every, run_in, tiny):
    config = replace(CONFIG, log_every=log_every, evaluate_every=0)

    def batches(step):
        batch = tiny.batch_of(step)
        if step == 4:
            batch["weights"] = np.full_like(batch["weights"], np.nan)
        return batch

    run = run_in(config=config)
    with pytest.raises(NonFiniteLoss, match="step 5: the loss is not finite"):
        train(tiny.job_of(batches=batches), config, run)
    assert checkpoint_steps(run.checkpoints) == [2, 4]
    stored = load_arrays(run.checkpoints, "trainable").state
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stored))
    assert [r["step"] for r in read_records(run.folder / "metrics.jsonl")] == [1, 2, 3, 4]


def test_every_step_is_reported_in_order_with_a_rate(tiny):
    reported = []
    config = replace(CONFIG, evaluate_every=0)
    train(tiny.job_of(), config, report=lambda step, metrics: reported.append((step, metrics)))
    assert [step for step, _ in reported] == list(range(1, 9))
    assert "tokens_per_second" not in reported[0][1]  # compilation falls into the first
    assert all(metrics["tokens_per_second"] > 0 for _, metrics in reported[1:])


def test_the_average_is_what_is_evaluated(run_in, tiny):
    config = replace(CONFIG, ema=0.5)
    seen = []

    def evaluate(trainable, frozen):
        seen.append(jax.device_get(trainable))
        return {"loss": 1.0}

    outcome = train(tiny.job_of(evaluate=evaluate), config, run_in(config=config))
    assert_same(seen[-1], jax.device_get(outcome.state.average))
    different = jax.tree.map(
        lambda a, b: bool((a != b).any()), outcome.state.average, outcome.state.trainable
    )
    assert any(jax.tree.leaves(different))


def test_a_metric_that_is_not_measured_is_an_error(tiny):
    config = replace(CONFIG, best_metric="+f1")
    with pytest.raises(
        InputError, match=r"best_metric='\+f1' is not measured; the evaluation has accuracy, loss"
    ):
        train(tiny.job_of(), config)


def test_evaluations_that_cannot_be_made_are_an_error(tiny):
    with pytest.raises(InputError, match="evaluate_every=4, but the job has nothing to evaluate with"):
        train(tiny.job_of(evaluate=None), CONFIG)


def test_a_run_of_another_model_is_not_gone_on_with(uninterrupted, tiny):
    with pytest.raises(InputError, match="a checkpoint of another model"):
        train(tiny.job_of(tiny.TinyModel(width=16)), CONFIG, uninterrupted[0])


def transformer(precision="fp32"):
    return Transformer(
        TransformerConfig(
            layers=1, width=8, vocab=13, attention=multi_head(2), mlp=MLP(8), precision=policy(precision)
        )
    )


def transformer_job(model, batch_of, **options):
    return Job(
        loss=language_modelling(full_tuning(model)),
        init=lambda rng, frozen: model.init(rng, jnp.zeros((1, 6), jnp.int32)),
        batches=batch_of,
        axes=model.axes,
        **options,
    )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_float32_masters(precision, tiny):
    config = replace(CONFIG, steps=6, precision=precision, evaluate_every=0)
    seen = []
    job = transformer_job(transformer(precision), tiny.batch_of)
    outcome = train(job, config, report=lambda step, metrics: seen.append(metrics))
    floats = [leaf for leaf in jax.tree.leaves(outcome.state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype.name for leaf in floats} == {"float32"}
    assert seen[-1]["loss"] < seen[0]["loss"]
    assert ("loss_scale" in seen[0]) == (precision == "fp16")


def test_double_precision_trains_in_float64(tiny, x64):
    config = replace(CONFIG, steps=2, precision="fp64", evaluate_every=0)
    outcome = train(transformer_job(transformer("fp64"), tiny.batch_of), config)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(outcome.state.trainable)} == {"float64"}


def test_the_state_of_a_tuned_delta_holds_nothing_of_the_backbone(run_in, tiny):
    model = transformer()
    tokens = jnp.asarray(tiny.batch_of(0)["tokens"])
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    tuned = attach(model, {"attention/(query|value)": LoRA(rank=2)})
    variables = tuned.init(jax.random.key(1), params, tokens)
    job = Job(
        loss=language_modelling(delta_tuning(tuned)),
        init=lambda rng, frozen: tuned.init(rng, frozen["params"], tokens)["delta"],
        batches=lambda step: tiny.batch_of(0),
        frozen={"params": params, "delta_state": variables["delta_state"]},
        axes=model.axes,
    )
    before = jax.device_get(params)
    config = replace(CONFIG, evaluate_every=0)
    run = run_in(config=config)
    outcome = train(job, config, run)

    expected = jax.tree.structure(variables["delta"])
    assert jax.tree.structure(outcome.state.trainable) == expected
    delta_size = sum(leaf.size for leaf in jax.tree.leaves(variables["delta"]))
    state_size = sum(leaf.size for leaf in jax.tree.leaves(outcome.state))
    assert 3 * delta_size <= state_size <= 3 * delta_size + 10  # delta, two moments, a few counters
    assert state_size < sum(leaf.size for leaf in jax.tree.leaves(params))
    stored = json.dumps(list(load_arrays(run.checkpoints).state), sort_keys=True)
    assert "embedding" not in stored
    record = (run.checkpoints / "8" / "record" / "metadata").read_text()
    assert "embedding" not in record and "~lora" in record
    assert_same(jax.device_get(params), before)
    assert losses(run)[-1] < losses(run)[0]
    assert isinstance(outcome.state, TrainState)


def test_a_paused_run_goes_on_as_one_that_never_paused(tiny, uninterrupted, run_in):
    run, whole = run_in(), uninterrupted[1]
    paused = train(tiny.job_of(), CONFIG, run, until=3)
    assert (int(paused.state.step), paused.stopped) == (3, None)
    assert paused.evaluations[-1]["step"] == 3 and checkpoint_steps(run.checkpoints)[-1] == 3
    again = train(tiny.job_of(), CONFIG, run, until=3)
    assert_same(again.state, paused.state)
    outcome = train(tiny.job_of(), CONFIG, run)
    assert_same(outcome.state, whole.state)
    assert losses(run) == losses(uninterrupted[0])
    assert [each["step"] for each in outcome.evaluations] == [3, 4, 8]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_one_compiled_step_serves_all_rates_and_seeds(tiny, name):
    optimizer = OptimizerConfig(name, 0.01, ScheduleConfig("cosine", 2), weight_decay=0.1)
    config = replace(CONFIG, optimizer=optimizer, evaluate_every=0)
    job, layout = tiny.job_of(), Layout.single()
    first = build_program(job, config, layout, NO_SCALING, any_rate=True)
    for rate, seed in ((0.01, 0), (0.03, 5)):
        each = replace(config, seed=seed, optimizer=replace(optimizer, learning_rate=rate))
        shared = build_program(job, each, layout, NO_SCALING, any_rate=True, step=first.step)
        assert shared.step is first.step
        found = train(job, each, layout=layout, program=shared).state
        expected = train(job, each, layout=layout).state
        assert int(found.seed) == seed
        for one, other in zip(jax.tree.leaves(found.trainable), jax.tree.leaves(expected.trainable)):
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-7)
