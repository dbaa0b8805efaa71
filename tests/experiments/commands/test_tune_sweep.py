"""Learning rates by successive halving: who goes on, what is said of it, what a second time does."""

import json
import re
from pathlib import Path

import pytest

from modicum.experiments.commands.tuning_runs import budget, rungs
from modicum.research.study.records import read_records
from modicum.research.training.config import TrainingConfig

OPTIONS = ["--batch", 8, "--steps", 8, "--evaluate-every", 2, "--clip", 0, "--seeds", 2]


def steps_of(folder):
    """The last step that a run was trained to."""
    return max(record["step"] for record in read_records(folder / "metrics.jsonl") if "loss" in record)


@pytest.fixture(scope="module")
def swept(modicum, tiny_published, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("swept")
    arguments = ["tune", tiny_published("bert"), "--data", data, "--out", out, *OPTIONS]
    arguments += ["--learning-rate", "1e-4", "3e-2", "1e30", "bitfit"]
    said = modicum(*arguments)
    assert said.code == 0, said.error
    return arguments, said, out


def test_the_better_half_goes_on(swept):
    _, said, out = swept
    scores = {rate: _scores(out / f"bitfit-{rate}") for rate in ("0.0001", "0.03")}
    better = max(scores, key=lambda rate: scores[rate][4])
    other = next(rate for rate in scores if rate != better)
    assert steps_of(out / f"bitfit-{better}") == 8 and steps_of(out / f"bitfit-{other}") == 4
    assert (out / f"bitfit-{better}" / "result.json").exists()
    assert not (out / f"bitfit-{other}" / "result.json").exists()
    assert "learning rates: 3 to step 2, 2 to step 4, 1 to step 8: 14 updates of 8 rows" in said.out
    assert re.search(r"^ +1e\+30 +not finite +– +–$", said.out, re.M), said.out
    assert re.search(rf"^ +{re.escape(better)} +\S+% +\S+% +\S+%$", said.out, re.M), said.out


def _scores(folder):
    """Step to the best (accuracy, -loss) on dev until there."""
    best, found = (-1.0, 0.0), {}
    for record in read_records(folder / "metrics.jsonl"):
        if "evaluation_loss" in record:
            best = max(best, (record["evaluation_accuracy"], -record["evaluation_loss"]))
            found[record["step"]] = best
    return found


def test_the_best_rate_gets_further_seeds(swept):
    _, said, out = swept
    best = Path(re.search(r"^best: (\S+): ", said.out, re.M)[1])
    folders = sorted(folder for folder in out.iterdir() if (folder / "result.json").exists())
    rate = best.name.removesuffix("-seed1")
    assert [folder.name for folder in folders] == [rate, f"{rate}-seed1"]
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    assert results[0]["dev_loss"] != results[1]["dev_loss"]
    mean = 50 * sum(result["test_accuracy"] for result in results)
    assert f"over 2 seeds: test accuracy {mean:.1f}% ± " in said.out
    by_dev = [(result["dev_accuracy"], -result["dev_loss"]) for result in results]
    assert best == folders[by_dev.index(max(by_dev))]


def test_a_second_time_trains_nothing(swept, modicum, contents_of):
    arguments, first, out = swept
    finished = [folder for folder in out.iterdir() if (folder / "result.json").exists()]
    before = {folder: contents_of(folder) for folder in finished}
    again = modicum(*arguments)
    assert again.code == 0
    assert again.out.splitlines()[-1] == first.out.splitlines()[-1]
    assert again.out.count("finished before, nothing to do") == 2
    assert {folder: contents_of(folder) for folder in finished} == before


@pytest.mark.parametrize(
    ("steps", "every", "stops"),
    [
        (300, 75, [75, 150, 300]),
        (300, 100, [100, 200, 300]),
        (300, 0, [300]),
        (4, 100, [4]),
        (10, 3, [3, 6, 10]),
        (1, 1, [1]),
    ],
)
def test_rungs_are_evaluations(steps, every, stops):
    assert rungs(TrainingConfig(steps=steps, evaluate_every=every)) == stops


def test_the_budget_is_told():
    assert budget(5, [75, 150, 300], 32) == (
        "learning rates: 5 to step 75, 3 to step 150, 2 to step 300: 900 updates of 32 rows, "
        "all of them to the end 1,500"
    )
    assert budget(2, [300], 8) == "learning rates: 2 to step 300: 600 updates of 8 rows"
