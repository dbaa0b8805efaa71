"""Data that cannot be used: one line that says what and where, and nothing is written."""

import shutil

import pytest


@pytest.fixture(params=["train", "tune", "evaluate"])
def command(request, trained, tmp_path, train_options, tune_options):
    """Each verb that reads data, as a function from the data's name to arguments."""
    out = ["--out", tmp_path / "out"]
    return {
        "train": lambda data, *more: ["train", data, *out, *train_options, *more],
        "tune": lambda data, *more: ["tune", trained, "--data", data, *out, *tune_options, *more, "probe"],
        "evaluate": lambda data, *more: ["evaluate", trained, "--data", data, *more],
    }[request.param]


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path):
    yield
    assert not (tmp_path / "out").exists()


def test_a_missing_file(refused, command, tmp_path):
    missing = tmp_path / "reviews.jsonl"
    assert refused(*command(missing)) == f"{missing}: no such file or folder"


def test_a_name_that_is_neither_here_nor_on_the_hub(refused, command, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert "no-such-data: no such file or folder here, and the hub" in refused(*command("no-such-data"))


def test_an_absent_column(refused, command, data):
    said = refused(*command(data, "--text-column", "sentence"))
    assert said.endswith("no column 'sentence'; the columns are: text, label, label_text")


@pytest.mark.parametrize("text, reason", [("", "the file is empty"), ("\n\n", "the file has no rows")])
def test_an_empty_data_set(refused, command, tmp_path, text, reason):
    file = tmp_path / "train.jsonl"
    file.write_text(text)
    assert refused(*command(file)) == f"{file}: {reason}"


def test_a_malformed_line(refused, command, tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text('{"text": "good", "label": 1}\n{"text": "bad", "label": \n')
    assert refused(*command(file)).startswith(f"{file}: line 2 is not JSON: ")


def test_a_row_without_text(refused, command, tmp_path, rows_file):
    file = rows_file(tmp_path / "train.jsonl", [{"text": "good", "label": 1}, {"text": None, "label": 0}])
    assert refused(*command(file)) == f"{file}: row 2 has no text in column 'text'"


def test_texts_of_nothing(refused, tmp_path, rows_file, train_options):
    file = rows_file(tmp_path / "train.jsonl", [{"text": ""}, {"text": ""}])
    assert refused("train", file, "--out", tmp_path / "out", *train_options) == (
        "no text to train a tokenizer on"
    )


def test_too_little_to_hold_any_out(refused, tmp_path, rows_file, train_options):
    file = rows_file(tmp_path / "train.jsonl", [{"text": "a good film"}])
    said = refused("train", file, "--out", tmp_path / "out", *train_options)
    assert said.startswith("holding out 0.05 of 1 rows leaves nothing")


def test_no_train_split(refused, tmp_path, data, train_options):
    shutil.copy(data / "dev.jsonl", tmp_path)
    said = refused("train", tmp_path, "--out", tmp_path / "out", *train_options)
    assert said == f"{tmp_path}: no train split; there is: dev"


@pytest.fixture
def tune(refused, trained, tmp_path, tune_options):
    return lambda data, *more: refused(
        "tune", trained, "--data", data, "--out", tmp_path / "out", *more, *tune_options, "probe"
    )


def test_no_dev_split(tune, data):
    assert tune(data / "train.jsonl").startswith(f"{data / 'train.jsonl'}: no dev split; tuning needs")


def test_a_label_that_the_train_split_lacks(tune, tmp_path, data, rows_file):
    shutil.copy(data / "train.jsonl", tmp_path)
    dev = rows_file(tmp_path / "dev.jsonl", [{"text": "so so", "label": 1}, {"text": "so so", "label": 2}])
    assert tune(tmp_path) == f"{dev}: row 2: the train split lacks label 2; it has: 0, 1"


def test_one_label_is_no_task(tune, tmp_path, data, rows_file):
    shutil.copy(data / "dev.jsonl", tmp_path)
    train = rows_file(tmp_path / "train.jsonl", [{"text": "good", "label": 1}, {"text": "fine", "label": 1}])
    assert tune(tmp_path) == f"{train}: only one label (1); two are needed to tell apart"


def test_an_absent_label_column(tune, data):
    said = tune(data, "--label-column", "stars")
    assert said.endswith("no column 'stars'; the columns are: text, label, label_text")


def test_a_text_longer_than_the_positions(tune, refused, modicum, trained, tmp_path, data, rows_file):
    shutil.copy(data / "train.jsonl", tmp_path)
    dev = rows_file(
        tmp_path / "dev.jsonl",
        [
            {"text": "good", "label": 1, "label_text": ""},
            {"text": "good " * 90, "label": 1, "label_text": ""},
        ],
    )
    assert tune(tmp_path).startswith(f"{dev}: row 2 has ")
    assert tune(tmp_path).endswith("the longest allowed 64; allow more, up to the model's positions, or "
                                   "truncate (--truncate)")  # fmt: skip


def test_a_label_the_delta_was_not_trained_for(refused, trained, tuned, tmp_path, rows_file):
    file = rows_file(tmp_path / "test.jsonl", [{"text": "so so", "label": 7}])
    said = refused("evaluate", trained, "--data", file, "--delta", tuned)
    assert said == f"{file}: row 1: the train split lacks label 7; it has: 0, 1"


def test_an_absent_split(refused, trained, tmp_path, data):
    shutil.copy(data / "train.jsonl", tmp_path)
    said = refused("evaluate", trained, "--data", tmp_path, "--split", "dev")
    assert said == f"{tmp_path}: no dev split; there is: train"
