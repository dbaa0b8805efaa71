"""`modicum tune` on published checkpoints: pairs of texts, answers in text, and what is stored of them."""

import json
import re
from pathlib import Path

import pytest

OPTIONS = ["--batch", 8, "--steps", 8, "--evaluate-every", 4, "--learning-rate", 0.01]


@pytest.fixture(scope="module")
def tune(modicum, tiny_published, tmp_path_factory):
    """Tune a published model; returns what was said and the folder of the last run."""

    def run(family, method, *options, data, out=None):
        out = out or tmp_path_factory.mktemp(family)
        arguments = [tiny_published(family), "--data", data, "--out", out, *OPTIONS, *options, *method]
        said = modicum("tune", *arguments)
        assert said.code == 0, said.error
        return said, Path(re.search(r"^best: (\S+): ", said.out, re.M)[1])

    return run


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def notes_of(folder):
    return json.loads((folder / "delta" / "delta.json").read_text())["notes"]


PAIRS = ("--text-column", "one", "--pair-column", "two", "--label-column", "same")


@pytest.mark.parametrize(
    ("family", "pooling"),
    [
        ("bert", "mean"),
        ("gpt2", "last"),
        pytest.param("llama", "last", marks=pytest.mark.slow),
        pytest.param("roberta", "mean", marks=pytest.mark.slow),
        pytest.param("t5", "mean", marks=pytest.mark.slow),
    ],
)
def test_pairs_are_classified_and_measured_again(tune, modicum, tiny_published, pairs, family, pooling):
    _, folder = tune(family, ["lora", "--rank", 2], *PAIRS, data=pairs)
    result, notes = result_of(folder), notes_of(folder)
    assert notes["pooling"] == pooling and notes["labels"] == [0, 1]
    assert notes["reading"]["pair_column"] == "two"
    again = modicum("evaluate", tiny_published(family), "--data", pairs, "--delta", folder)
    expected = f"loss {result['test_loss']:.4f}  accuracy {result['test_accuracy']:.4f}\n"
    assert (again.code, again.out) == (0, expected), again.error


ANSWERS = ("--prompt", "{text} so", "--target-column", "label_text")


@pytest.mark.parametrize("family", ["gpt2", "t5", pytest.param("llama", marks=pytest.mark.slow)])
def test_answers_in_text(tune, modicum, tiny_published, data, family):
    said, folder = tune(family, ["lora", "--rank", 4], *ANSWERS, data=data)
    result, notes = result_of(folder), notes_of(folder)
    assert notes["kind"] == "text-to-text" and notes["reading"]["prompt"] == "{text} so"
    assert set(result) > {"dev_loss", "dev_accuracy", "test_loss", "test_accuracy", "test_exact_match"}
    assert re.search(
        r"^best: \S+: test loss \S+, test accuracy \S+% of tokens, \S+% of texts exact, ", said.out, re.M
    )
    again = modicum("evaluate", tiny_published(family), "--data", data, "--delta", folder)
    measured = {name: result[f"test_{name}"] for name in ("loss", "accuracy", "exact_match")}
    expected = "  ".join(f"{name} {value:.4f}" for name, value in measured.items())
    assert (again.code, again.out) == (0, f"{expected}\n"), again.error


def test_an_answer_is_learned(tune, data):
    more = ["--steps", 120, "--batch", 16, "--evaluate-every", 60, "--learning-rate", 0.01]
    _, folder = tune("gpt2", ["full"], *ANSWERS, *more, data=data)
    result = result_of(folder)
    assert result["test_accuracy"] > 0.75 and result["test_exact_match"] > 0.5
