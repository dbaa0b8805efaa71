"""The study of MoEfication on its smallest size, resumed; its tables and its words on known figures."""

import json

import pytest

from modicum import InputError
from modicum.experiments.bench.ffn import DENSE, Seen, measure_feed_forward
from modicum.experiments.bench.ffn_job import JOBS, FeedForwardJob
from modicum.experiments.bench.ffn_report import ffn_table, floors
from modicum.experiments.moefication import SIZES, Study
from modicum.experiments.moefication_report import measure_costs, verdicts, write_moefication


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, quick_compile):
    folder = tmp_path_factory.mktemp("study")
    data = folder / "data"
    text = "the cat sat on the mat and saw the dog . it was a fine day , said the old man to the boy . "
    for name, splits in {
        "wikitext2_valid_test": ("valid", "test"),
        "tinyshakespeare": ("train", "valid"),
    }.items():
        (data / name).mkdir(parents=True)
        for split in splits:
            (data / name / f"{split}.txt").write_text(text * 40)
    study = Study(folder / "runs", data, SIZES["smoke"])
    return study, study.run()


def test_every_cell_is_run_once_and_found_again(smoke):
    study, results = smoke
    cells = [(one["construction"], one["router"], one["share"]) for one in results]
    pairs = [(a, b, 0.5) for b in ("oracle", "MLP") for a in ("random", "clusters")]
    assert cells == [*pairs, ("no experts", "threshold", 0.5)]
    oracle = next(one for one in results if one["router"] == "oracle")
    assert oracle["recall"] == pytest.approx(1.0) and oracle["mass"] == pytest.approx(oracle["best"])
    files = {path: path.stat().st_mtime_ns for path in study.folder.rglob("result.json")}
    assert len(files) == 6 and study.run() == results
    assert files == {path: path.stat().st_mtime_ns for path in study.folder.rglob("result.json")}


def test_tables_and_figures_are_written(smoke, tmp_path):
    study, results = smoke
    costs = measure_costs(study.size, {"decoder": (64, 256, 1)}, rounds=2)
    text = write_moefication(tmp_path, results, costs, tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == text
    assert "| clusters" in text and "| no experts" in text and "50% / " not in text.split("## Cost")[0]
    assert "## Cost" in text and "×" in text.split("## Cost")[1]
    assert sorted(each.name for each in (tmp_path / "figures").iterdir()) == [
        "decoder-constructions.svg",
        "decoder-routers.svg",
    ]


def result(construction, router, accuracy, seed=0, share=0.2):
    told = {"construction": construction, "router": router, "seed": seed, "share": share}
    return {"subject": "x", **told, "accuracy": accuracy, "dense accuracy": 0.8, "mass": 0.5, "recall": 0.5}


def test_verdicts_say_what_the_figures_say():
    good = [result("clusters", "MLP", 0.79, seed) for seed in (0, 1)]
    poor = [result("random", "MLP", value, seed) for seed, value in enumerate((0.6, 0.61))]
    said = verdicts([*good, *poor, result("random", "oracle", 0.78)])
    assert "at least 97% of the accuracy: holds (98.8%)" in said
    assert "clearly worse: holds (+23.1 points" in said and "the router loses 21.9 points" in said
    said = verdicts([result("clusters", "MLP", 0.7), result("random", "MLP", 0.7)])
    assert "does not hold (87.5%)" in said and "clearly worse: does not hold (+0.0 points" in said


def test_the_bench_pairs_turns(monkeypatch):
    monkeypatch.setitem(JOBS, "tiny", FeedForwardJob("tiny", 32, 128, 2))
    asked = {"jobs": ["tiny"], "shares": [0.5], "batches": [1]}
    seen = measure_feed_forward(**asked, contenders=["gather", "mask"], rounds=3, report=lambda line: None)
    assert all(len(times) == 3 for times in seen.times.values()) and len(seen.times) == 3
    table = ffn_table(seen)
    assert [row[3] for row in table.rows] == [DENSE, "gather", "mask"]
    with pytest.raises(InputError, match="contenders: 'none' is unknown"):
        measure_feed_forward(**asked, contenders=["none"], rounds=1)


def test_floors_are_of_medians_over_pairs():
    times = {("t5-base", 1, 1.0, DENSE): [3.0, 4.0, 50.0], ("t5-base", 1, 0.2, "gather"): [1.0, 2.0, 30.0]}
    assert floors(Seen(times)) == "t5-base, 20%: the floor of 1.5× is met (2.00×)"
    times["t5-base", 1, 0.2, "gather"] = [3.0, 4.0, 50.0]
    assert "is not met (1.00×)" in floors(Seen(times))
    assert json.dumps(Seen(times).gain(("t5-base", 1, 0.2, "gather"))) == "[1.0, 1.0, 1.0]"
