"""The study of emotion neurons, whole, on a tiny encoder and made-up emotions; its tables and figures."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from modicum import InputError
from modicum.experiments.emotion_neurons import SIZES, Study
from modicum.experiments.emotion_neurons_report import effects, similarities, write_report
from modicum.experiments.emotion_tasks import Emotions
from modicum.experiments.skill_neurons_work import read_at_once

WORDS = 30
GROUPS = {
    "anger": ["anger", "annoyance"],
    "joy": ["joy", "love"],
    "sadness": ["grief"],
    "surprise": ["wonder"],
}
NAMES = ("anger", "annoyance", "joy", "love", "grief", "wonder")


@pytest.fixture(scope="module")
def study(tmp_path_factory, tiny_backbone):
    """Six emotions, each with a word of its own; four texts of one and eight of another in test."""
    data, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    folder = data / "goemotions"
    folder.mkdir()
    (folder / "ekman_mapping.json").write_text(json.dumps(GROUPS))
    for split, count in {"train": 12, "dev": 8, "test": 8}.items():
        with open(folder / f"{split}.jsonl", "w") as file:
            for number, name in enumerate(sorted(NAMES)):
                for _ in range(count // 2 if name == "grief" else count):
                    text = draw.permutation([number + 2, *draw.integers(10, WORDS, 5)])
                    said = {"text": " ".join(map(str, text)), "label": number, "label_text": name}
                    file.write(json.dumps(said) + "\n")
    size = replace(SIZES["smoke"], length=8, emotions=NAMES, draws=2)
    jax.config.update("jax_disable_most_optimizations", True)
    yield Study(tmp_path_factory.mktemp("study"), data, size, tiny_backbone(WORDS))
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def found(study):
    return study.run()


def test_tasks_are_balanced_and_their_texts_fixed(study):
    emotions = study.emotions
    assert study.names == NAMES and study.groups.tolist() == ["anger"] * 2 + ["joy"] * 2 + [
        "sadness",
        "surprise",
    ]
    task, again = emotions.task("grief", study.size), emotions.task("grief", study.size)
    for split, count in {"train": 12, "dev": 8, "test": 8}.items():
        rows = getattr(task, split)
        assert len(rows) == count and sum(int(rows[i]["label"]) for i in range(count)) == count // 2
        assert rows.numbers == getattr(again, split).numbers
    word = sorted(NAMES).index("grief") + 2
    assert all((word in row["tokens"]) == row["label"] for row in (task.train[i] for i in range(12)))
    assert {int(row["label"]) for row in map(emotions.spread("dev", 6).__getitem__, range(6))} == set(
        range(6)
    )
    with pytest.raises(InputError, match="emotions: 'awe' is unknown; valid: anger, annoyance"):
        emotions.ordered(["awe"])


def test_only_a_smoke_tests_batches_are_smaller():
    assert [read_at_once(SIZES[name]) for name in ("full", "quick", "smoke")] == [32, 32, 16]
    assert read_at_once(replace(SIZES["full"], dev_rows=0)) == 32


def test_groups_must_be_there(study, tiny_backbone, tmp_path):
    with pytest.raises(InputError, match=r"ekman_mapping\.json: no such file"):
        Emotions.load(tmp_path, tiny_backbone(WORDS).tokenizer, 8)


def test_all_tasks_share_one_program_and_masks_hold_what_they_say(study, found):
    assert set(found["trial"]) == set(found["masked"]) == {(name, 0) for name in NAMES}
    assert study.programs.perturbed._correct._cache_size() == 1
    assert study.programs.predictivity._sums._cache_size() == 1
    masks = study.masks(0)
    assert not masks["whole"].any() and masks["random/1/0.2"].sum() == masks["texts/anger/0.2"].sum()
    assert all(mask.shape == (2, 32) for mask in masks.values()) and len(masks) == 1 + 8 + 1 + 2
    for result in found["masked"].values():
        assert set(result["correct"]) == set(masks)
    assert np.isnan(study.ratings("valence")).tolist() == [False] * 5 + [True]
    assert study.ratings("valence")[:5].tolist() == [0, 0, 1, 1, 0]


def test_the_control_is_the_trials_own_prompt_before_training(study, found):
    work = study.work("anger")
    start = jax.device_get(work.programs.trials.start(0, study.size.rate).variables)
    own = work.read(start)[1].by_neuron()
    np.testing.assert_allclose(found["arrays"]["anger", 0]["untrained"], own, atol=1e-6)
    np.testing.assert_array_equal(  # the vocabulary's first vectors, as the page says
        start["delta"]["~soft_prompt"]["prompt"],
        jax.device_get(work.programs.trials.start(1, study.size.rate).variables)["delta"]["~soft_prompt"][
            "prompt"
        ],
    )
    assert np.abs(own - found["arrays"]["anger", 0]["predictivity"]).max() > 0


def test_effects_are_differences_of_accuracies(study, found):
    by_name = {(each.ranking, each.attribute): each for each in effects(study, found, 0.2)}
    one = by_name["prompts", "anger"]
    rows = [found["masked"][name, 0] for name in ("anger", "annoyance")]
    total = sum(row["rows"] for row in rows)

    def accuracy(label):
        return 100 * sum(len(row["correct"][label]) for row in rows) / total

    assert one.chosen == pytest.approx(accuracy("prompts/anger/0.2"))
    assert one.random == pytest.approx(np.mean([accuracy(f"random/{draw}/0.2") for draw in (0, 1)]))
    assert one.gap.mean == pytest.approx(one.random - one.chosen)
    assert one.contrast.mean == pytest.approx(one.gap.mean - one.others.mean)
    assert by_name["predictivity", "all"].others is None and len(by_name) == 9


def test_a_gap_is_as_uncertain_as_the_masks_and_seeds_that_it_stands_on(study, found):
    """Of two seeds random masks leave all texts or none; over texts alone there would be no doubt."""
    rows = list(range(8))

    def right(seed):
        random = {f"random/{draw}/0.2": rows if (draw + seed) % 2 else [] for draw in (0, 1)}
        chosen = dict.fromkeys(study.masks(0), rows[:4]) | random
        return {"correct": chosen, "rows": 8}

    made = {**found, "masked": {(name, seed): right(seed) for name in NAMES for seed in (0, 1)}}
    told = effects(study, made, 0.2)[1]
    assert told.attribute == "anger" and told.gap.mean == 0 and told.contrast.mean == 0
    assert told.gap.low <= -45 and told.gap.high >= 45 and (told.as_bad, told.draws) == (2, 4)
    apart = told.contrast.high - told.contrast.low
    assert apart < 0.7 * (told.gap.high - told.gap.low)  # the same masks hit the other emotions alike
    alone = {**made, "masked": {(name, 0): right(0) for name in NAMES}}
    assert effects(study, alone, 0.2)[1].draws == 2


def test_more_masks_tune_no_new_prompt(study, found):
    folders = set(study.folder.iterdir())
    more = replace(study, size=replace(study.size, draws=5, shares=(0.1, 0.4), seeds=(0, 1)))
    assert more.arrays("anger", 0).keys() == found["arrays"]["anger", 0].keys()
    assert len(more.masks(0)) == 1 + 2 * (8 + 1 + 5) and set(study.folder.iterdir()) == folders


def test_the_study_runs_once_and_writes_its_page(study, found, tmp_path):
    written = {path: path.stat().st_mtime_ns for path in study.folder.rglob("result.json")}
    assert study.run()["masked"] == found["masked"]
    assert {path: path.stat().st_mtime_ns for path in study.folder.rglob("result.json")} == written
    page = tmp_path / "emotion.md"
    text = write_report(study, found, page)
    assert page.read_text() == text and text.count("\n## ") == 4
    for name in ("similarity", "masked", "tree_predictivity", "tree_activated", "tree_texts"):
        assert (tmp_path / "emotion" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    maps = similarities(found, NAMES)
    assert len(maps) == 8
    for similarity in maps.values():
        np.testing.assert_allclose(np.diag(similarity), 1, atol=1e-6)
        np.testing.assert_allclose(similarity, similarity.T)
