"""Runs of one tuning task: one compiled step for all rates and seeds, what is stored, what loads again."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from modicum import InputError
from modicum.models import MLP, ClassifierHead, Transformer, TransformerConfig, multi_head
from modicum.parallel.layout import Layout
from modicum.research.data.completions import Completions, Lengths
from modicum.research.data.examples import Examples
from modicum.research.delta import AdaLoRA, Full, LoRA, project
from modicum.research.delta import DiffPruning as Pruning
from modicum.research.study.runs import Run
from modicum.research.training import program as program_module
from modicum.research.training.config import OptimizerConfig, ScheduleConfig, TrainingConfig
from modicum.research.training.model_folder import TrainedModel, with_classifier
from modicum.research.training.rank_allocation import rank_allocation
from modicum.research.training.tuning import Tuner, TuningTask, load_tuned

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = TrainingConfig(
    steps=4,
    batch=4,
    optimizer=OptimizerConfig("adamw", 0.01, ScheduleConfig("constant", 0)),
    evaluate_every=2,
    best_metric="+accuracy",
)
DECODER = TransformerConfig(layers=1, width=16, vocab=20, attention=multi_head(2), mlp=MLP(16))
NOTES = {"kind": "classification", "labels": ["no", "yes"], "pooling": "last"}
LORA = {"attention/(query|value)": LoRA(2), "classifier": Full()}


@pytest.fixture(scope="module")
def body():
    model = Transformer(DECODER)
    return TrainedModel(model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))


def labelled(count, seed):
    rng = np.random.default_rng(seed)
    ids = [rng.integers(2, 20, rng.integers(2, 6)).astype(np.int32) for _ in range(count)]
    return Examples(ids, np.asarray([row[0] % 2 for row in ids], np.int32), 6)


def classifying(body, spec, seed=0, **options):
    model, params = with_classifier(body, ClassifierHead(2), seed)
    rows = {"train": labelled(16, 0), "dev": labelled(8, 1), "test": labelled(8, 2)}
    return TuningTask(model, params, spec, rows, notes=NOTES, **options)


def open_run(folder, config):
    name = f"{config.optimizer.learning_rate:g}-{config.seed}"
    return Run.open(folder, config, seed=config.seed, name=name)


def at_rate(rate, seed=0):
    return replace(CONFIG, seed=seed, optimizer=replace(CONFIG.optimizer, learning_rate=rate))


def test_one_step_is_compiled_for_all_rates_and_seeds(body, tmp_path, monkeypatch):
    compiled, make = [], program_module._lowered
    monkeypatch.setattr(program_module, "_lowered", lambda *each: compiled.append(1) or make(*each))
    tuner, dev = Tuner(Layout.single()), {}
    for rate, seed in ((0.01, 0), (0.1, 0), (0.1, 1)):
        config, task = at_rate(rate, seed), classifying(body, LORA, seed)
        run = open_run(tmp_path, config)
        tuner.train(run, task, config, until=2)
        outcome = tuner.train(run, task, config)
        tuner.finish(run, task, config, outcome)
        dev[rate, seed] = run.result["dev_loss"]
    assert compiled == [1] and len(set(dev.values())) == 3
    alone = Tuner(Layout.single()).train(open_run(tmp_path / "alone", config), task, config)
    for one, other in zip(jax.tree.leaves(alone.state), jax.tree.leaves(outcome.state)):
        np.testing.assert_array_equal(one, other)
    delta = load_tuned(tmp_path / "0.1-1" / "delta", body.model, body.params)
    assert dict(delta.notes) == NOTES
    tokens = jnp.asarray(task.rows["test"][0]["tokens"])[None]
    variables = {"delta": outcome.best.trainable, "delta_state": delta.variables["delta_state"]}
    np.testing.assert_array_equal(
        delta.tuned.apply(delta.variables, delta.params, tokens),
        task.tuned().apply(variables, task.params, tokens),
    )


def test_a_method_may_wrap_the_optimizer(body, tmp_path):
    def budget(optimizer, steps):
        return rank_allocation(optimizer, target=1, steps=steps)

    spec = {"attention/(query|value)": AdaLoRA(3), "classifier": Full()}
    config, task = at_rate(0.05), classifying(body, spec, wrap=budget)
    outcome = Tuner(Layout.single()).train(open_run(tmp_path, config), task, config)
    kept = [leaf for path, leaf in jax.tree.leaves_with_path(outcome.state.trainable) if path[-1].key == "e"]
    assert sum(int((each != 0).sum()) for each in kept) == 2  # one a site, of two sites


def test_what_a_delta_is_settled_to_is_measured_and_stored(body, tmp_path):
    spec = {"layers_0": Pruning(), "classifier": Full()}
    task = classifying(body, spec, settle=lambda *each: project(*each, 0.01))
    config, tuner = at_rate(0.05), Tuner(Layout.single())
    run = open_run(tmp_path, config)
    tuner.finish(run, task, config, tuner.train(run, task, config))
    delta = load_tuned(run.folder / "delta", body.model, body.params)
    assert [entry.method.name for entry in delta.tuned.entries] == ["sparse_offset", "full"]
    rows = [task.rows["test"][index] for index in range(8)]
    right = [
        int(
            delta.tuned.apply(
                delta.variables, delta.params, row["tokens"][None], segments=row["segments"][None]
            )[0].argmax()
        )
        == row["label"]
        for row in rows
    ]
    assert run.result["test_accuracy"] == pytest.approx(np.mean(right))


def test_answers_in_text_are_measured_with_what_generates(body, tmp_path):
    prompts, answers = [[3, 4, 5], [6, 7]] * 4, [[8, 1], [9, 9, 1]] * 4
    rows = Completions(prompts, answers, ["a", "b"] * 4, Lengths(8, 0))
    task = TuningTask(
        body.model, body.params, {"attention/query": LoRA(2)}, {"train": rows, "dev": rows}, "text-to-text"
    )
    config = replace(at_rate(0.01), best_metric="loss")
    tuner, run, seen = Tuner(Layout.single()), open_run(tmp_path, config), []

    def measure(task, plain):
        model, params = plain()
        seen.append(model.apply(params, jnp.asarray([[3, 4, 5]])).shape)
        return {"dev_exact_match": 0.5}

    tuner.finish(run, task, config, tuner.train(run, task, config), measure)
    assert seen == [(1, 3, 20)] and run.result["dev_exact_match"] == 0.5
    assert "test_loss" not in run.result


def test_a_state_without_a_rate(tiny):
    from modicum.research.training.rates import set_rate
    from modicum.research.training.state import create_state

    with pytest.raises(InputError, match="has no rate to set"):
        set_rate(create_state({"a": jnp.zeros(2)}, optax.sgd(1.0)), 0.1)
