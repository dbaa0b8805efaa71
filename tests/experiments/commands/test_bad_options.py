"""Options that cannot be: refused at once, with what would be valid, and nothing is written."""

import pytest

from modicum.models.presets import PRESETS


@pytest.fixture
def train(refused, data, tmp_path, train_options):
    """`modicum train` with these options more; returns why it was refused."""

    def run(*more):
        said = refused("train", data, "--out", tmp_path / "out", *train_options, *more)
        assert not (tmp_path / "out").exists()
        return said

    return run


@pytest.fixture
def tune(refused, data, trained, tmp_path, tune_options):
    """`modicum tune` with these options more, by the method given."""

    def run(*more, method=("probe",)):
        said = refused(
            "tune", trained, "--data", data, "--out", tmp_path / "out", *tune_options, *more, *method
        )
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
        return said

    return run


def test_an_unknown_preset_has_near_misses(train):
    assert train("--preset", "gpt-2") == "preset 'gpt-2' is unknown; did you mean gpt2, gpt2-xl, gpt1?"
    assert all(name in train("--preset", "#") for name in PRESETS)


def test_a_preset_that_is_no_language_model(train):
    assert train("--preset", "transformer-base") == (
        "preset 'transformer-base' is an encoder-decoder; a language model is a decoder"
    )


def test_rows_longer_than_the_positions(train, tune, refused, trained, data):
    expected = (
        "sequence length 4096 exceeds the model's 64 positions; "
        "use length <= 64 or a model with more positions"
    )
    assert train("--length", 4096) == expected
    assert tune("--length", 4096) == expected
    assert refused("evaluate", trained, "--data", data, "--length", 4096) == expected


AXES = "data, fsdp, tensor, context, pipe, expert"
REASONS = {
    "--mesh data=3": "mesh data=3 needs 3 devices, 8 are here; choose axis sizes whose product is 8",
    "--mesh dta=8": f"mesh 'dta=8': unknown axis 'dta'; the axes are {AXES}",
    "--mesh data": "mesh 'data': 'data' is no axis=size, such as data=2",
    "--mesh data=8 --batch 12": (
        "the batch: 12 rows do not divide into 8 blocks (data); use a multiple, such as 16"
    ),
    "--batch 8 --accumulate 3": "batch=8 does not divide into accumulate=3 parts",
    "--zero 3": "zero=3 splits over a mesh, and none is given; add --mesh data=8",
    "--coordinator localhost:1 --process 0": (
        "--processes missing; several processes need all of "
        "--coordinator, --processes, --process, or none under a launcher"
    ),
    "--coordinator localhost --processes 2 --process 0": (
        "processes: coordinator 'localhost' is no host:port"
    ),
    "--coordinator localhost:1 --processes 2 --process 2": (
        "processes: index 2 of 2 processes; an index runs from 0 to count - 1"
    ),
    "--steps 0": "steps=0 must be at least 1",
    "--seed -1": "seed=-1 must be at least 0 and below 2**32",
    "--learning-rate nan": "learning_rate=nan must be a finite number of at least 0",
    "--clip -1": "clip=-1.0 must be a finite number of at least 0",
    "--ema 1": "ema=1.0 must be at least 0 and below 1",
}


@pytest.mark.parametrize("verb", ["train", "tune"])
@pytest.mark.parametrize("options", REASONS)
def test_numbers_that_do_not_fit(train, tune, verb, options):
    assert {"train": train, "tune": tune}[verb](*options.split()) == REASONS[options]


def test_a_size_that_does_not_divide_over_the_mesh(train):
    said = train("--mesh", "tensor=8", "--batch", 8)
    assert said.startswith(
        "embedding/table: axis 'vocab' of size 300 does not divide over tensor=8; pad it to"
    )


def test_a_tokenizer_that_is_not_there_or_none(train, tmp_path, data):
    missing = tmp_path / "tokenizer.json"
    assert train("--tokenizer", missing) == f"{missing}: no such tokenizer file"
    said = train("--tokenizer", data / "dev.jsonl")
    assert said.startswith(f"{data / 'dev.jsonl'}: not a tokenizer.json: ")


def test_a_vocabulary_smaller_than_the_bytes(train):
    assert train("--vocab", 20) == "vocab is 20; at least 258 is valid: the bytes and <pad>, <eos>"


def test_no_learning_rate_at_all(tune):
    said = tune("--learning-rate", method=("probe",))
    assert said == "learning_rate: no number given; give one or more, such as 3e-4 1e-3"


def test_deltas_that_cannot_be(tune):
    assert tune(method=("lora", "--rank", 0)) == "LoRA rank=0 must be at least 1"
    assert tune(method=("adapter", "--activation", "step")).startswith(
        "adapter activation='step' is not one of"
    )
    said = tune(method=("lora", "--at", "atention/query"))
    assert said.startswith("delta address 'atention/query' names no module; near misses: attention/query")


@pytest.mark.parametrize("below", [False, True])
def test_an_out_that_is_a_file(refused, data, trained, tmp_path, train_options, tune_options, below):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    out = file / "run" if below else file
    for verb in (["train", data, *train_options], ["tune", trained, "--data", data, *tune_options]):
        said = refused(*verb, "--out", out, *(["probe"] if verb[0] == "tune" else []))
        assert f"{file}" in said and "is a file; choose another place" in said
    assert file.read_text() == "mine"


def test_an_out_that_holds_something_else(refused, data, tmp_path, train_options, contents_of):
    (tmp_path / "notes.txt").write_text("mine")
    before = contents_of(tmp_path)
    said = refused("train", data, "--out", tmp_path, *train_options)
    assert said == f"{tmp_path}: holds 'notes.txt' and no run; choose a new or an empty folder"
    assert contents_of(tmp_path) == before


def test_an_out_that_may_not_be_written(refused, data, tmp_path, train_options, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path / "out"))

    monkeypatch.setattr("modicum.research.study.runs.write_atomically", refuse)
    said = refused("train", data, "--out", tmp_path / "out", *train_options)
    assert said == f"{tmp_path / 'out'}: Permission denied"


def test_debug_shows_where_it_arose(modicum, tmp_path):
    plain = modicum("train", tmp_path / "none.jsonl")
    debug = modicum("--debug", "train", tmp_path / "none.jsonl")
    assert "Traceback" not in plain.error
    assert debug.error.startswith("Traceback") and debug.error.endswith(plain.error)
    assert (plain.code, debug.code) == (2, 2)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["trian", "data"], "trian"),
        (["train", "data", "--learning-rat", "1e-3"], "--learning-rate"),
        (["train"], "Missing from modicum train"),
        (["tune", "model", "--data", "data", "lorra"], "lora, dora, adalora, "),
        (["train", "data", "--steps", "many"], "--steps"),
        (["train", "data", "--precision", "fp8"], "fp32"),
        ([], "quickstart"),
    ],
)
def test_usage_errors_name_the_option_and_the_command(modicum, arguments, expected):
    code, out, error = modicum(*arguments)
    assert code == 2 and not out
    assert expected in error and "modicum" in error and "Traceback" not in error
