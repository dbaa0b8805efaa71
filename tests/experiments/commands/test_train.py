"""`modicum train`: what a run leaves behind, doing it twice, stopping where numbers are not finite."""

import json
import shutil

import pytest

from modicum.models import StatisticalTopK
from modicum.research.study.records import read_records
from modicum.research.training.checkpoints import checkpoint_steps
from modicum.research.training.model_folder import load_model


def test_a_run_leaves_a_model_and_what_was_measured(trained):
    result = json.loads((trained / "result.json").read_text())
    assert {"loss", "accuracy", "perplexity", "parameters", "step"} <= set(result)
    assert {file.name for file in (trained / "model").iterdir()} == {
        "model.json",
        "parameters.safetensors",
        "tokenizer.json",
    }
    losses = [record["loss"] for record in read_records(trained / "metrics.jsonl") if "loss" in record]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_evaluate_measures_what_train_said(modicum, data, trained):
    said = modicum("evaluate", trained, "--data", data, "--split", "dev", "--length", 16)
    assert said.code == 0
    result = json.loads((trained / "result.json").read_text())
    names = ("loss", "accuracy", "perplexity")
    assert said.out.split() == [word for name in names for word in (name, f"{result[name]:.4f}")]


def test_a_finished_run_is_left_as_it_is(modicum, data, trained, train_options, contents_of):
    before = contents_of(trained)
    said = modicum("train", data, "--out", trained, *train_options)
    assert said.code == 0
    assert said.out.startswith(f"{trained}: finished before, nothing to do; evaluation loss ")
    assert contents_of(trained) == before


def test_what_saves_memory_makes_no_other_run(modicum, refused, data, trained, train_options):
    said = modicum("train", data, "--out", trained, *train_options, "--remat", "full", "--loss-chunk", 8)
    assert said.out.startswith(f"{trained}: finished before, nothing to do"), said.error
    refused("train", data, "--out", trained, *train_options, "--length", 8)


def test_a_run_killed_before_its_result_ends_the_same(
    modicum, data, trained, copy_of_trained, train_options, contents_of
):
    (copy_of_trained / "result.json").unlink()
    (copy_of_trained / "model" / "model.json").unlink()
    assert modicum("train", data, "--out", copy_of_trained, *train_options).code == 0
    assert contents_of(copy_of_trained) == contents_of(trained)


def test_one_file_is_split_into_train_and_evaluation(modicum, data, tmp_path, train_options):
    file = shutil.copy(data / "train.jsonl", tmp_path)
    said = modicum("train", file, "--out", tmp_path / "run", *train_options, "--holdout", 0.1)
    assert said.code == 0, said.error
    assert "evaluation loss" in said.out


def test_a_refused_command_is_not_in_the_way_of_the_right_one(
    modicum, refused, data, tmp_path, train_options
):
    out = tmp_path / "run"
    refused("train", data, "--out", out, *train_options, "--mesh", "tensor=8", "--batch", 8)
    assert not out.exists()
    assert modicum("train", data, "--out", out, *train_options).code == 0


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_stops_the_run(
    modicum, data, tmp_path, train_options, contents_of, precision
):
    out = tmp_path / "run"
    wild = ["--learning-rate", "1e30", "--clip", "0", "--checkpoint-every", "1", "--precision", precision]
    if precision == "fp16":  # where the scale is at its floor: smaller does not help
        wild += ["--steps", "100"]
    code, _, error = modicum("train", data, "--out", out, *train_options, *wild)
    assert code == 2
    assert error.startswith("modicum: error: step ") and "is not finite (loss " in error
    assert error.count("\n") == 1
    step = int(error.split()[3].removesuffix(":"))
    assert step > 1
    assert [record["step"] for record in read_records(out / "metrics.jsonl")][-1] == step - 1
    assert checkpoint_steps(out / "checkpoints")[-1] == step - 1
    assert not (out / "result.json").exists() and not (out / "model").exists()
    kept = contents_of(out / "checkpoints")
    again = modicum("train", data, "--out", out, *train_options, *wild)
    assert (again.code, again.error) == (code, error)
    assert contents_of(out / "checkpoints") == kept


def test_an_activation_is_chosen_and_has_a_price(modicum, refused, data, trained, tmp_path, train_options):
    out = tmp_path / "run"
    chosen = ("--activation", "statistical-topk:4", "--price", 0.5)
    said = modicum("train", data, "--out", out, *train_options, *chosen)
    assert said.code == 0, said.error
    mlp = load_model(out / "model").model.config.mlp
    assert mlp.activation == StatisticalTopK(4)
    steps = [record for record in read_records(out / "metrics.jsonl") if "loss" in record]
    assert all(record["activation_size"] > 0 for record in steps)
    asked = json.loads((out / "config.json").read_text())["config"]
    assert asked["penalty"]["stages"] == [[0, 0.0], [2, 0.5]]
    assert "penalty" not in json.loads((trained / "config.json").read_text())["config"]
    said = refused("train", data, "--out", tmp_path / "no", *train_options, "--activation", "drelu")
    assert "ReLU on both products of a gated layer; this one is plain" in said
    said = refused("train", data, "--out", tmp_path / "no", *train_options, "--activation", "topk:9000")
    assert "top-k: k=9000 of " in said and not (tmp_path / "no").exists()
