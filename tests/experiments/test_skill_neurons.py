"""The study of skill neurons, whole, on a tiny encoder and made-up data; its tables and its words."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from modicum.experiments.delta_tasks import Task
from modicum.experiments.skill_neurons import SIZES, Study
from modicum.experiments.skill_neurons_cells import balanced_accuracy
from modicum.experiments.skill_neurons_deltas import NONE, updates, without_head
from modicum.experiments.skill_neurons_relations import similarities
from modicum.experiments.skill_neurons_report import (
    accuracy_table,
    gap,
    modules_table,
    perturbation_table,
    stability_table,
    write_report,
)

WORDS = 30
MINE = {
    "one": Task("one", 8),
    "two": Task("two", 8),
    "three": Task("three", 8),
}
KINDS = {"one": "a", "two": "a", "three": "b"}


@pytest.fixture(scope="module")
def study(tmp_path_factory, tiny_backbone):
    """Tasks whose label is which of two words a text has; all have one shape, so one set of programs."""
    folder, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, words in {"one": (5, 6), "two": (5, 6), "three": (6, 7)}.items():
        (folder / name).mkdir()
        for split, count in {"train": 96, "dev": 40, "test": 40}.items():
            with open(folder / name / f"{split}.jsonl", "w") as file:
                for row in range(count):
                    label = row % len(words)
                    text = draw.permutation([words[label], *draw.integers(8, WORDS, 5)])
                    said = " ".join(map(str, text))
                    file.write(json.dumps({"text": said, "label": label}) + "\n")
    size = replace(SIZES["smoke"], seeds=(0,), read_rows=64, dev_rows=32, test_rows=32, tasks=tuple(MINE))
    jax.config.update("jax_disable_most_optimizations", True)
    yield Study(tmp_path_factory.mktemp("study"), folder, size, tiny_backbone(WORDS), MINE)
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def found(study):
    return study.run()


def test_the_study_runs_once_and_says_what_it_found(study, found, tmp_path):
    written = {path: path.stat().st_mtime_ns for path in study.folder.rglob("result.json")}
    again = study.run()
    assert again["trial"] == found["trial"] and again["speed"] == found["speed"]
    assert {path: path.stat().st_mtime_ns for path in study.folder.rglob("result.json")} == written
    page = tmp_path / "skill.md"
    text = write_report(study.folder, found, KINDS, page, study.size.checkpoints)
    assert page.read_text() == text
    assert text.count("\n## ") == 10 and "predictivity" in text
    for name in (
        "layers",
        "modules",
        "neuron",
        "overlap",
        "perturbation",
        "similarity",
        "skill_overlap",
        "transfer",
    ):
        assert (tmp_path / "skill" / f"{name}.png").exists() and f"(skill/{name}.png)" in text


def test_more_draws_tune_no_new_prompt(study, found):
    folders = set(study.folder.iterdir())
    more = replace(study, size=replace(study.size, draws=5, kept=(0.5,)))
    assert more.trial("one", 0) == found["trial"]["one", 0]
    assert set(study.folder.iterdir()) == folders
    assert replace(study, size=replace(study.size, seeds=(0, 1))).checkpoints(1) == ()


def test_all_choices_of_tasks_are_compared_on_the_same_texts(study):
    """A trial's cell is not named by the other tasks, so its states may not depend on them."""
    other = replace(study, size=replace(study.size, tasks=("three", "two", "one")))
    for name, values in study._works._common.items():
        np.testing.assert_array_equal(other._works._common[name], values)


def test_trials_measure_every_question_with_its_controls(found):
    for trial in found["trial"].values():
        assert len(trial["top"]) == len(trial["shuffled_top"]) == 1
        assert all(0 <= trial[key] <= 1 for key in ("accuracy", "top_test", "untrained_top_test"))
        assert len(trial["by_layer"]) == 2
    arrays = found["arrays"]["three", 0]
    assert arrays["predictivity"].shape == (1, 2, 32) and arrays["predictivity"].min() >= 0.5
    assert arrays["thresholds"].shape == (1, 2, 4, 32) and arrays["states"].shape == (2, 4, 32)
    assert np.isfinite(arrays["means"]).all() and (arrays["deviations"] >= 0).all()
    rows = accuracy_table(found, list(MINE), [0]).rows
    assert [row[0] for row in rows] == list(MINE)


def test_gaps_are_means_over_examples(found):
    result = found["effects"]["one", 0]
    assert result["rows"] == 32
    skill, control, draws, interval = told = gap(found, "one", [0], "mean/0.2")
    assert skill == pytest.approx(100 * len(result["correct"]["mean/0.2/skill"]) / 32)
    assert interval.mean == pytest.approx(control - skill) and interval.low <= interval.mean <= interval.high
    assert draws == [control] and told.as_bad == f"{int(control <= skill)} of 1"
    assert len(perturbation_table(found, list(MINE), [0]).rows) == 6


def test_a_task_is_like_itself_and_transfer_has_every_prompt(found):
    maps = similarities(found, list(MINE), [0])
    assert len(maps) == 11
    for each in maps.values():
        np.testing.assert_allclose(np.diag(each), 1, atol=1e-6)
    assert set(found["transfer"]["two", 0]) == {*MINE, "untrained", "seconds"}


def test_deltas_are_asked_what_prompts_are(study, found):
    assert set(found["deltas"]["two", 0]) == {*MINE, NONE, "seconds"}
    stored = found["lora_arrays"]["one", 0]
    assert updates(stored).shape == (4, 8, 8) and np.abs(updates(stored)).max() > 0
    assert stored["predictivity"].shape == (1, 2, 32) and stored["states"].shape == (2, 1, 32)
    work, programs = study.work("one"), study.deltas["one"]
    assert programs is study.deltas["two"]
    fresh = without_head(programs.trials.start(0, 0.1).variables)
    before, after = (programs.hidden(each, work, work.rows.test) for each in (fresh, work.variables(stored)))
    batch = next(iter(work.batches(work.rows.test)))
    plain = study.backbone.model.apply(study.backbone.params, batch["tokens"], segments=batch["segments"])
    real = (batch["segments"] > 0)[..., None]
    np.testing.assert_allclose(before[:4], ((plain * real).sum(1) / real.sum(1))[:4], atol=1e-5)
    assert np.abs(after - before).max() > 1e-4


def test_modules_are_asked_for_in_the_models_own_experts(study, found):
    experts, result = study.experts, found["modules"]["one", 0]
    assert experts.shape == (2, 32) and all((np.bincount(row) == 2).all() for row in experts)
    assert {"experts", "neurons", "random experts0", "random neurons0"} == set(result["correct"])
    assert 0 <= result["together"] <= 1 and 0 < result["p"] <= 1 and result["of"] == 32
    assert {len(each) for each in result["stability"].values()} == {2}  # untrained, a third, all steps
    assert len(stability_table(found, list(MINE), [0], study.size.checkpoints).rows) == 9
    assert len(modules_table(found, list(MINE), [0]).rows) == 3


def test_pruned_models_are_smaller(found):
    share = found["speed"]["share"]
    assert share["0.1"] < share["whole"] == 1.0 and set(found["speed"]["ratio"]) == set(share)


def test_balanced_accuracy_counts_labels_alike():
    truth, chosen = np.asarray([0, 0, 0, 1]), np.zeros(4, int)
    assert balanced_accuracy(chosen, truth) == 0.5
