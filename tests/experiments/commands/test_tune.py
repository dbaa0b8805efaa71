"""`modicum tune`, then `modicum evaluate` on what it stored."""

import json
import re
from pathlib import Path

import pytest

METHODS = {
    "lora": ["lora", "--rank", "2"],
    "adapter": ["adapter", "--width", "4"],
    "bitfit": ["bitfit"],
    "probe": ["probe"],
    "full": ["full"],
}


def best_of(said):
    """Folder and test accuracy that the last line of `modicum tune` names."""
    found = re.search(r"^best: (\S+): test accuracy (\S+)%, [\d,]+ trained .* bytes stored$", said.out, re.M)
    assert found, said
    return Path(found[1]), float(found[2])


@pytest.fixture(scope="module")
def runs(modicum, data, trained, tmp_path_factory, tune_options):
    """Method to the run of it and what was said; each method is tuned once."""
    folder, done = tmp_path_factory.mktemp("tune"), {}

    def run(method):
        if method not in done:
            arguments = ["tune", trained, "--data", data, "--out", folder, *tune_options]
            arguments += ["--steps", 120, "--batch", 16, "--evaluate-every", 60, *METHODS[method]]
            said = modicum(*arguments)
            assert said.code == 0, said.error
            done[method] = arguments, said
        return done[method]

    return run


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ("adapter", "bitfit") else [])
        for name in METHODS
    ],
)
def test_evaluate_finds_the_test_accuracy_that_tune_printed(runs, modicum, data, trained, method):
    folder, accuracy = best_of(runs(method)[1])
    assert folder.name == f"{method}-0.01"
    model = [folder] if method == "full" else [trained, "--delta", folder]
    said = modicum("evaluate", *model, "--data", data)
    assert said.code == 0, said.error
    result = json.loads((folder / "result.json").read_text())
    assert said.out == f"loss {result['test_loss']:.4f}  accuracy {result['test_accuracy']:.4f}\n"
    assert f"{100 * result['test_accuracy']:.1f}" == f"{accuracy:.1f}"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_words_that_decide_are_learned(runs, method):
    assert best_of(runs(method)[1])[1] > 75.0


@pytest.mark.parametrize("method", ["lora", "full"])
def test_again_is_nothing_to_do(runs, modicum, contents_of, method):
    arguments, first = runs(method)
    folder, _ = best_of(first)
    before = contents_of(folder)
    again = modicum(*arguments)
    assert again.code == 0
    assert again.out == f"{folder}: finished before, nothing to do\n{first.out}"
    assert contents_of(folder) == before


def test_a_delta_is_stored_as_a_delta_only(runs):
    sizes = {}
    for method in ("lora", "probe"):
        folder, _ = best_of(runs(method)[1])
        assert not (folder / "model").exists()
        result = json.loads((folder / "result.json").read_text())
        sizes[method] = sum(file.stat().st_size for file in (folder / "delta").iterdir())
        assert result["stored_bytes"] == sizes[method]
    whole, _ = best_of(runs("full")[1])
    parameters = (whole / "model" / "parameters.safetensors").stat().st_size
    assert max(sizes.values()) < parameters / 4


def test_a_delta_given_to_a_whole_model(runs, refused, data):
    folder, _ = best_of(runs("full")[1])
    said = refused("evaluate", folder, "--data", data, "--delta", folder)
    assert said == f"{folder} holds a whole model, no delta: evaluate {folder} itself, without --delta"


def test_labels_may_be_names(modicum, data, trained, tmp_path, tune_options):
    columns = ["--data", data, "--label-column", "label_text"]
    said = modicum("tune", trained, *columns, "--out", tmp_path, *tune_options, "probe")
    folder, accuracy = best_of(said)
    again = modicum("evaluate", trained, *columns, "--delta", folder)
    assert f"{float(again.out.split()[-1]):.3f}" == f"{accuracy / 100:.3f}"
    notes = json.loads((folder / "delta" / "delta.json").read_text())["notes"]
    assert notes["labels"] == ["negative", "positive"]


@pytest.mark.slow
def test_the_best_learning_rate_by_dev_is_reported(modicum, data, trained, tmp_path, tune_options):
    rates = ["--learning-rate", "1e-5", "3e-2", "--steps", "12"]
    said = modicum("tune", trained, "--data", data, "--out", tmp_path, *tune_options, *rates, "probe")
    dev = {
        run.name: json.loads((run / "result.json").read_text())["dev_accuracy"] for run in tmp_path.iterdir()
    }
    assert set(dev) == {"probe-1e-05", "probe-0.03"}
    assert dev[best_of(said)[0].name] == max(dev.values())
    best = best_of(said)[0].name
    assert f"{tmp_path / best}: dev accuracy {dev[best]:.1%} (best at step " in said.out
    for name, accuracy in dev.items():
        rate = re.escape(name.removeprefix("probe-"))
        assert re.search(rf"^ *{rate} +{accuracy:.1%}$", said.out, re.M)


@pytest.mark.slow
def test_a_diverging_learning_rate_leaves_the_others(modicum, data, trained, tmp_path, tune_options, caplog):
    arguments = ["tune", trained, "--data", data, "--out", tmp_path, *tune_options, "--clip", "0"]
    said = modicum(*arguments, "--learning-rate", "1e30", "1e-2", "full")
    assert said.code == 0
    assert best_of(said)[0] == tmp_path / "full-0.01"
    assert [f"{tmp_path / 'full-1e+30'}: step " in record.getMessage() for record in caplog.records].count(
        True
    ) == 1
    alone = modicum(*arguments, "--learning-rate", "1e30", "full")
    assert alone.code == 2 and alone.error.startswith("modicum: error: step ")
    both = modicum(*arguments, "--learning-rate", "1e30", "1e29", "full")
    assert both.code == 2 and "finite at none of the learning rates" in both.error


@pytest.mark.slow
def test_pooling_makes_another_run(modicum, refused, data, trained, tmp_path, tune_options):
    arguments = ["tune", trained, "--data", data, "--out", tmp_path, *tune_options]
    assert modicum(*arguments, "probe").code == 0
    said = refused(*arguments, "--pooling", "mean", "probe")
    assert "config.head.pooling is 'last' there and 'mean' here" in said


@pytest.mark.slow
def test_longer_texts_are_cut_where_asked(modicum, data, trained, tmp_path, tune_options):
    arguments = ["--data", data, "--length", 8, "--truncate"]
    said = modicum("tune", trained, "--out", tmp_path, *tune_options, *arguments, "probe")
    folder, accuracy = best_of(said)
    again = modicum("evaluate", trained, *arguments, "--delta", folder)
    assert f"{float(again.out.split()[-1]):.3f}" == f"{accuracy / 100:.3f}"
