"""`modicum neurons`: neurons of a model, with and without a prompt, and what is refused."""

import csv
import re

import pytest


@pytest.fixture(scope="module")
def prompted(modicum, tiny_published, data, tmp_path_factory):
    """A tiny BERT and a soft prompt of three vectors."""
    out = tmp_path_factory.mktemp("prompted")
    options = ["--batch", 8, "--steps", 4, "--evaluate-every", 0, "--learning-rate", 0.01]
    said = modicum(
        "tune", tiny_published("bert"), "--data", data, "--out", out, *options, "soft-prompt", "--length", 3
    )
    assert said.code == 0, said.error
    return tiny_published("bert"), out / "soft-prompt-0.01"


def test_neurons_are_read_at_the_prompt_and_written(modicum, prompted, data, tmp_path):
    model, delta = prompted
    said = modicum(
        "neurons",
        model,
        "--data",
        data,
        "--delta",
        delta,
        "--out",
        tmp_path,
        "--fraction",
        0.1,
        "--batch",
        16,
    )
    assert said.code == 0, said.error
    assert said.out.startswith("0 or 1 (a neuron chosen by shuffled labels: ")
    rows = re.findall(r"layer (\d+) neuron (\d+) at place (\d+): \w+ its mean, dev ([\d.]+)%", said.out)
    assert len(rows) == 8 and {int(place) for _, _, place, _ in rows} <= {0, 1, 2}
    accuracies = [float(each) for *_, each in rows]
    assert accuracies == sorted(accuracies, reverse=True) and accuracies[0] > 50
    with open(tmp_path / "neurons.csv") as file:
        listed = list(csv.DictReader(file))
    layers = {row["layer"] for row in listed}
    width = len(listed) // len(layers)
    assert all(sum(row["layer"] == layer for row in listed) == width for layer in layers)
    assert float(listed[0]["dev"]) * 100 == pytest.approx(accuracies[0], abs=0.06)
    assert (tmp_path / "neuron_0.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "layers.md").exists()


def test_a_language_models_neurons_are_read_over_the_text(modicum, trained, data):
    said = modicum("neurons", trained, "--data", data, "--read", "max", "--rows", 64)
    assert said.code == 0, said.error
    assert set(re.findall(r"at place (\d+)", said.out)) == {"0"}


def test_what_is_not_there_to_read_is_said(refused, trained, tuned, prompted, data):
    assert "needs a --delta that is a prompt" in refused(
        "neurons", trained, "--data", data, "--read", "prompt"
    )
    lora = refused("neurons", trained, "--data", data, "--delta", tuned, "--read", "prompt")
    assert "valid here: mean, max" in lora
    assert "batch=0" in refused("neurons", trained, "--data", data, "--batch", 0)
    assert "no test split" in refused("neurons", trained, "--data", data / "train.jsonl")
