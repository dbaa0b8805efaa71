"""Folders of runs, models and deltas that are another's, damaged or not there."""

import json
import logging
import shutil

import pytest

from modicum import InputError
from modicum.experiments.commands.reading import Reading


def truncate(path, part=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])


def truncate_checkpoint(folder, step):
    """Cut the arrays of one step short."""
    files = [path for path in (folder / "checkpoints" / str(step)).rglob("d/*") if path.is_file()]
    truncate(max(files, key=lambda path: path.stat().st_size))


@pytest.fixture
def unfinished(copy_of_trained):
    """A run whose checkpoints are there and whose result is not, as after a kill."""
    (copy_of_trained / "result.json").unlink()
    shutil.rmtree(copy_of_trained / "model")
    return copy_of_trained


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "options, difference",
    [
        (["--learning-rate", "0.5"], "config.training.optimizer.learning_rate is 0.001 there and 0.5 here"),
        (["--steps", "5"], "config.training.steps is 4 there and 5 here"),
        (["--preset", "modern-tiny"], "config.model.attention.bias is True there and False here"),
    ],
)
def test_another_run_is_left_alone(
    refused, data, copy_of_trained, train_options, contents_of, finished, options, difference
):
    if not finished:
        (copy_of_trained / "result.json").unlink()
    before = contents_of(copy_of_trained)
    said = refused("train", data, "--out", copy_of_trained, *train_options, *options)
    assert said.startswith(f"{copy_of_trained}: holds another run ({difference}")
    assert said.endswith("choose another folder")
    assert contents_of(copy_of_trained) == before


@pytest.fixture(scope="module")
def other(modicum, data, tmp_path_factory, train_options):
    """A finished run of a model with another vocabulary."""
    folder = tmp_path_factory.mktemp("other") / "lm"
    assert modicum("train", data, "--out", folder, *train_options, "--vocab", 280).code == 0
    return folder


def test_checkpoints_of_another_model(refused, data, unfinished, other, train_options):
    """Should a run folder's checkpoints be exchanged for others, shapes tell."""
    shutil.rmtree(unfinished / "checkpoints")
    shutil.copytree(other / "checkpoints", unfinished / "checkpoints")
    said = refused("train", data, "--out", unfinished, *train_options)
    assert f"{unfinished / 'checkpoints' / '4'}: a checkpoint of another model: " in said
    assert "embedding/table" in said and "280" in said and "300" in said


def test_a_truncated_newest_checkpoint_gives_way_to_the_one_before(
    modicum, data, trained, unfinished, train_options, caplog
):
    truncate_checkpoint(unfinished, 4)
    with caplog.at_level(logging.WARNING):
        said = modicum("train", data, "--out", unfinished, *train_options)
    assert said.code == 0
    warnings = [record.getMessage() for record in caplog.records]
    assert any("step 4: " in text and "going back to step 2" in text for text in warnings), warnings
    for name in ("metrics.jsonl", "result.json", "model/parameters.safetensors"):
        assert (unfinished / name).read_bytes() == (trained / name).read_bytes()
    assert (unfinished / "checkpoints" / "4.damaged").is_dir()


def test_no_checkpoint_that_can_be_read(refused, data, unfinished, train_options, contents_of):
    for step in (2, 4):
        truncate_checkpoint(unfinished, step)
    before = contents_of(unfinished)
    said = refused("train", data, "--out", unfinished, *train_options)
    assert said.startswith(f"{unfinished / 'checkpoints'}: no checkpoint there can be read: step 4: ")
    assert "step 2: " in said
    assert contents_of(unfinished) == before


def test_truncated_json_of_a_run(refused, data, copy_of_trained, train_options):
    for name in ("result.json", "config.json"):
        truncate(copy_of_trained / name)
        said = refused("train", data, "--out", copy_of_trained, *train_options)
        assert said.startswith(f"{copy_of_trained / name}: not JSON: ")


@pytest.fixture(params=["tune", "evaluate"])
def command(request, data, tmp_path, tune_options):
    """The verbs that read a model, as functions from its path to arguments."""
    out = ["--out", tmp_path / "out"]
    return {
        "tune": lambda model: ["tune", model, "--data", data, *out, *tune_options, "probe"],
        "evaluate": lambda model: ["evaluate", model, "--data", data],
    }[request.param]


def test_a_model_that_is_not_there(refused, command, tmp_path):
    missing = tmp_path / "model"
    said = refused(*command(missing))
    assert said == f"{missing} does not exist; give a model folder or a finished run of `modicum train`"


def test_a_folder_that_is_no_model(refused, command, data, unfinished):
    for folder in (data, data / "train.jsonl", unfinished):
        said = refused(*command(folder))
        assert said.startswith(f"{folder} holds no model.json; give a model folder or a finished run")


def test_truncated_parameters(refused, command, copy_of_trained):
    file = copy_of_trained / "model" / "parameters.safetensors"
    for part in (0.9, 0.0):
        truncate(file, part)
        assert refused(*command(copy_of_trained)).startswith(f"{file} cannot be read: ")


def test_parameters_of_another_configuration(refused, command, copy_of_trained):
    file = copy_of_trained / "model" / "model.json"
    description = json.loads(file.read_text())
    description["config"]["width"] = 64
    file.write_text(json.dumps(description))
    said = refused(*command(copy_of_trained))
    assert "parameters.safetensors: array " in said and "the configuration says" in said


@pytest.mark.parametrize(
    "text, reason",
    [
        ('{"format": 1', "line 1: not JSON"),
        ("[]", "holds a list; a model is described by an object"),
        ('{"format": 9}', "format 9; this version reads 1"),
        ('{"format": 1, "config": {}, "head": null}', "no 'labels' in it; the file is damaged"),
        ('{"format": 1, "config": {"_class": "Nonsense"}, "head": null, "labels": []}', "'Nonsense'"),
    ],
)
def test_a_damaged_description(refused, command, copy_of_trained, text, reason):
    (copy_of_trained / "model" / "model.json").write_text(text)
    assert reason in refused(*command(copy_of_trained))


def test_a_model_without_tokenizer(refused, command, copy_of_trained):
    (copy_of_trained / "model" / "tokenizer.json").unlink()
    said = refused(*command(copy_of_trained))
    assert said == f"{copy_of_trained} has no tokenizer.json, so texts cannot be encoded for it"


@pytest.fixture
def evaluate(refused, data):
    return lambda model, delta: refused("evaluate", model, "--data", data, "--delta", delta)


def test_a_delta_that_is_not_there(evaluate, trained, data):
    assert evaluate(trained, data).startswith(f"{data} holds no delta.json; give a delta folder or")


def test_a_run_that_has_no_delta_yet(evaluate, trained, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert evaluate(trained, tmp_path).startswith(f"{tmp_path} is a run that was not finished: ")


def test_a_configuration_that_is_no_text(evaluate, tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{")
    assert evaluate(tmp_path, tmp_path).startswith(f"{tmp_path} holds no ")


def test_notes_of_another_version():
    with pytest.raises(InputError, match="reading='second_column', which nobody here knows"):
        Reading.of({"reading": {"text_column": "text", "second_column": "b"}})


def test_a_delta_of_another_backbone(evaluate, modicum, data, tuned, other, tmp_path, train_options):
    reseeded = tmp_path / "reseeded"
    assert modicum("train", data, "--out", reseeded, *train_options, "--seed", 1).code == 0
    for backbone in (other, reseeded):
        said = evaluate(backbone, tuned)
        assert said.startswith(f"{tuned / 'delta'}: this delta belongs to backbone ")


def test_a_damaged_delta(evaluate, trained, tuned, tmp_path):
    delta = shutil.copytree(tuned / "delta", tmp_path / "delta")
    tensors = next(delta.glob("*.safetensors"))
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-7])
    assert evaluate(trained, delta).endswith("; the file is truncated")
    tensors.write_bytes(whole[:-7] + bytes(7))
    assert evaluate(trained, delta).endswith(
        "contents differ from the sha256 in delta.json; the file is damaged"
    )
    truncate(delta / "delta.json")
    assert evaluate(trained, delta).startswith(f"{delta / 'delta.json'}: not valid JSON")
