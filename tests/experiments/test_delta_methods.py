"""The study of delta methods, whole, on a tiny encoder and made-up data; its tables and its words."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from modicum import InputError
from modicum.experiments.delta_methods import FEW_METHODS, RECIPES, SIZES, Recipe, Study
from modicum.experiments.delta_methods_report import verdicts, write_few, write_methods
from modicum.experiments.delta_tasks import TASKS, Task, load_task, matthews_correlation
from modicum.models import Transformer, TransformerConfig
from modicum.models.attention import GroupedQuery
from modicum.models.norms import LayerNorm
from modicum.models.positions import Learned
from modicum.research import delta

WORDS = 30


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set whose label is whether the text has the token 5, and a pair with the same question."""
    folder, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, columns in {"single": ("text",), "pair": ("text", "other")}.items():
        (folder / name).mkdir()
        for split, count in {"train": 64, "dev": 24, "test": 32}.items():
            with open(folder / name / f"{split}.jsonl", "w") as file:
                for _ in range(count):
                    label = int(draw.integers(2))
                    words = draw.integers(6, WORDS, 6)
                    words[0] = 5 if label else 6
                    text = " ".join(map(str, draw.permutation(words)))
                    file.write(json.dumps({**dict.fromkeys(columns, text), "label": label}) + "\n")
    return folder


@pytest.fixture(scope="module")
def backbone(tiny_backbone):
    return tiny_backbone(WORDS, token_types=2)


# As many ranks and units as the matrices of this model have room for.
SMALL = {
    "LoRA": Recipe({"attention/(query|value)": delta.LoRA(rank=2)}),
    "PiSSA": Recipe({"attention/(query|value)": delta.LoRA(rank=2, initialisation="pissa")}),
    "DoRA": Recipe({"attention/(query|value)": delta.DoRA(rank=2)}),
    "last layer": Recipe({"layers_{1-}": delta.Full()}),
    "parallel adapter": Recipe({"layers_{0-1}/(attention|mlp)": delta.ParallelAdapter(width=2)}),
    "low-rank adapter": Recipe({"mlp/down": delta.LowRankAdapter(reduction=4)}),
    "LoRA+": Recipe({"attention/(query|value)": delta.LoRA(rank=2)}, b_rate=16.0),
    "AdaLoRA": Recipe({"attention/(query|value)": delta.AdaLoRA(rank=3)}, ranks=2),
    "random subset": Recipe({"re:layers_\\d+": delta.RandomSubset(fraction=0.05)}),
    "diff pruning": Recipe({"re:layers_\\d+": delta.DiffPruning()}, keep=0.05),
}
MINE = {
    "single": Task("single", 8),
    "pair": Task("pair", 16, "text", "other", dev="", test="dev", metric="mcc"),
}


@pytest.fixture(scope="module")
def study(data, backbone, tmp_path_factory):
    size = replace(SIZES["smoke"], steps=6, dev_rows=16, test_rows=0)
    folder = tmp_path_factory.mktemp("study")
    jax.config.update("jax_disable_most_optimizations", True)
    yield Study(folder, data, size, backbone, {**RECIPES, **SMALL}, MINE)
    jax.config.update("jax_disable_most_optimizations", False)


def test_a_study_is_run_once_and_writes_its_tables(study):
    names = ["full tuning", "LoRA", "diff pruning", "linear probe"]
    results = study.run(["single"], names)
    assert [result["method"] for result in results[::2]] == names
    by_name = {result["method"]: result for result in results}
    tuned = {name: result["tuned_parameters"] for name, result in by_name.items()}
    assert tuned["linear probe"] == 8 * 2 + 2
    assert tuned["diff pruning"] == tuned["linear probe"] + round(0.05 * body(study))
    assert tuned["full tuning"] > tuned["LoRA"] > tuned["linear probe"]
    assert all(np.isfinite(result["test_loss"]) for result in results)
    assert all(result["stored_bytes"] >= 4 * result["tuned_parameters"] for result in results)
    written = {path: path.stat().st_mtime_ns for path in study.folder.rglob("result.json")}
    assert study.run(["single"], names) == results
    assert {path: path.stat().st_mtime_ns for path in study.folder.rglob("result.json")} == written
    page = study.folder / "page.md"
    text = write_methods(study.folder, results, {"LoRA": 12.34}, page)
    assert page.read_text() == text and "| LoRA " in text and "12.3" in text
    assert "The literature's order" in text


def body(study):
    """Numbers in the layers of the study's model."""
    params = study.backbone.params
    return sum(delta.parameter_count(params[name]) for name in params if name.startswith("layers_"))


def test_pairs_mcc_and_few_examples(study):
    results = study.run(["pair"], ["linear probe"])
    assert {"test_mcc", "dev_mcc", "test_accuracy"} <= set(results[0])
    few = study.run(["single"], ["LoRA"], few=True)
    assert [(r["examples"], r["seed"]) for r in few] == [(8, 0), (8, 1)]
    assert set(FEW_METHODS) <= set(RECIPES)
    assert "8 examples" in write_few(study.folder, few, None)


def test_the_stored_delta_is_the_one_that_was_measured(study, backbone):
    result = study.run(["single"], ["LoRA"])[0]
    folder = next(study.folder.glob("single-LoRA-seed0-*")) / "delta"
    model, params = backbone.with_head(2)
    tuned, variables = delta.load_delta(folder, model, params)
    rows = study.rows("single").test
    batch = {name: np.stack([rows[i][name] for i in range(len(rows))]) for name in rows[0]}
    logits = tuned.apply(variables, params, batch["tokens"], segments=batch["segments"])
    assert np.mean(np.argmax(logits, -1) == batch["label"]) == result["test_accuracy"]
    assert delta.parameter_count(variables["delta"]) == result["tuned_parameters"]


def test_what_goes_with_the_optimizer(study):
    lora, plus = (study.run(["single"], [name])[0] for name in ("LoRA", "LoRA+"))
    assert lora["tuned_parameters"] == plus["tuned_parameters"] and lora["test_loss"] != plus["test_loss"]
    study.run(["single"], ["AdaLoRA"])
    folder = next(study.folder.glob("single-AdaLoRA-seed0-*")) / "delta"
    _, variables = delta.load_delta(folder, *study.backbone.with_head(2))
    kept = [np.count_nonzero(e) for path, e in flatten_dict(variables["delta"]).items() if path[-1] == "e"]
    assert sum(kept) == 2 * len(kept) == 2 * 2 * 2


def test_steps_are_timed_in_turns(study):
    times = study.step_times("single", ["LoRA", "linear probe"], rounds=2)
    assert set(times) == {"LoRA", "linear probe"} and all(value > 0 for value in times.values())


def test_splits_do_not_overlap_and_few_rows_are_balanced(data, backbone):
    rows = load_task(data, MINE["pair"], backbone.tokenizer, dev_rows=16, test_rows=0)
    assert not set(rows.train.numbers) & set(rows.dev.numbers)
    assert len(rows.train) + len(rows.dev) == 64 and len(rows.dev) == 16 and len(rows.test) == 24
    few = rows.few(10, seed=1)
    labels = [int(few[i]["label"]) for i in range(len(few))]
    assert sorted(labels) == [0] * 5 + [1] * 5 and set(few.numbers) <= set(rows.train.numbers)
    assert list(rows.few(10, seed=1).numbers) == list(few.numbers) != list(rows.few(10, seed=2).numbers)


def test_matthews_correlation():
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 2, 50), draw.integers(0, 2, 50)
    assert matthews_correlation(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert matthews_correlation(a, a) == pytest.approx(1.0) and matthews_correlation(a, 0 * b) == 0.0


def test_missing_data_is_named(tmp_path, backbone):
    with pytest.raises(InputError, match=r"sst2: no such data set"):
        load_task(tmp_path, TASKS["sst2"], backbone.tokenizer, dev_rows=0, test_rows=0)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ([0.89, 0.90], ["≈ full tuning holds here: LoRA (0.50%;", "is -0.5 points", "within the spread"]),
        ([0.70, 0.71], ["≈ full tuning does not hold here", "full tuning > LoRA holds"]),
        ([0.98, 0.99], ["holds here: LoRA (0.50%;", "is +8.5 points", "full tuning > LoRA is reversed"]),
    ],
)
def test_the_words_follow_the_figures(lora, words):
    def runs(method, values, tuned):
        return [
            {
                "method": method,
                "metric": "accuracy",
                "test_accuracy": v,
                "dev_accuracy": v,
                "tuned_parameters": tuned,
                "parameters": 1000,
            }
            for v in values
        ]

    text = verdicts(runs("full tuning", [0.89, 0.91], 1000) + runs("LoRA", lora, 5))
    assert all(word in text for word in words), text


def test_the_recipes_stay_below_one_percent_of_minilm():
    config = TransformerConfig(
        kind="encoder",
        layers=6,
        width=384,
        vocab=30522,
        attention=GroupedQuery(12),
        positions=Learned(512),
        norm=LayerNorm(),
        token_types=2,
    )
    model = Transformer(config, None)
    tokens = jnp.zeros((1, 4), int)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    total = delta.parameter_count(params)
    larger = {"full tuning", "last layer", "diff pruning", "linear probe"}
    for name in set(RECIPES) - larger:
        tuned = delta.attach(model, RECIPES[name].spec)
        variables = jax.eval_shape(tuned.init, jax.random.key(0), params, tokens)
        assert delta.parameter_count(variables["delta"]) < 0.01 * total, name
    assert len(flatten_dict(params)) > 90
