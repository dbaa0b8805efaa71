"""The study of MoEfication on its smallest size, resumed; its tables and its words on known figures."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from modicum import InputError
from modicum.experiments.bench.ffn import DENSE, Seen, measure_feed_forward
from modicum.experiments.bench.ffn_job import JOBS, FeedForwardJob
from modicum.experiments.bench.ffn_report import ffn_table, floors
from modicum.experiments.moefication import SIZES, Study
from modicum.experiments.moefication_report import write_moefication
from modicum.experiments.moefication_verdicts import FREE, verdicts
from modicum.experiments.moefication_work import THRESHOLD, share_of_products
from modicum.models.selection import LowRankSelection, MLPSelection, OracleSelection


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
    assert all(one["used"] == 0.5 for one in results) and results[0]["products"] == 0.75
    assert 0.1 < oracle["dense active"] < 0.9 and len(oracle["mass by layer"]) == 1


def test_with_finished_nothing_is_run(smoke, tmp_path):
    study, results = smoke
    more = replace(study, size=replace(study.size, seeds=(0, 1)), finished=True)
    assert more.run() == results
    with pytest.raises(InputError, match="no cell of this size is finished"):
        replace(study, folder=tmp_path, finished=True).run()
    assert not any(tmp_path.iterdir())


def test_what_draws_nothing_is_run_with_one_seed():
    study = Study(Path(), Path(), SIZES["full"])
    first, other = list(study.cells(0)), list(study.cells(1))
    assert len(first) == 21 and len(other) == 17
    assert set(first) - set(other) == {("contiguous", name) for name in ("oracle", *FREE)} | {THRESHOLD}


def test_tables_and_figures_are_written(smoke, tmp_path):
    study, results = smoke
    times = study.times(measure=True)
    assert [(one["router"], one["share"]) for one in times] == [("MLP", 0.5)] and times[0]["ms"] > 0
    assert replace(study, finished=True).times(measure=False) == times
    text = write_moefication(tmp_path, results, times, study.size, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert text in page and "| no experts" in text and "×" in text.split("Multiplications")[1]
    assert "This page has 5 cells: 5 of seed 0" in page and "1 layers, D=64, F=256" in page
    assert "moefication --size smoke --times" in page and "Decoders are trained for 4 steps" in page
    assert "MiniLM" not in page and "sparse" not in page.split("\n## ")[0]
    names = sorted(each.name for each in (tmp_path / "figures").iterdir())
    assert names == [f"decoder-{each}.svg" for each in ("constructions", "mass", "routers", "time")]
    assert all(f"(page/{name})" in page and (tmp_path / "page" / name).exists() for name in names)


def test_products_count_the_router():
    asked = 8, 32, 256, 1024  # chosen, experts, D, F
    assert share_of_products(MLPSelection(), *asked) == 0.25 + 2 * 32 * (256 + 32) / (4 * 256 * 1024)
    assert share_of_products(LowRankSelection(8), *asked) == 0.25 + 2 * 8 * (256 + 32) / (4 * 256 * 1024)
    assert share_of_products(OracleSelection(), *asked) == 0.5 + 0.25 / 2


def result(construction, router, accuracy, seed=0, share=0.2):
    told = {"construction": construction, "router": router, "seed": seed, "share": share}
    return {"subject": "x", **told, "accuracy": accuracy, "dense accuracy": 0.8, "mass": 0.5, "recall": 0.5}


def test_verdicts_say_what_the_figures_say():
    good = [result("clusters", "MLP", 0.79, seed) for seed in (0, 1)]
    poor = [result("random", "MLP", value, seed) for seed, value in enumerate((0.6, 0.61))]
    oracles = [result("random", "oracle", 0.78, seed) for seed in (0, 1)]
    free = [result("clusters", "centres", 0.75), result("clusters", "similarity", 0.77)]
    said = verdicts([*good, *poor, *oracles, *free])
    assert "keep at least 97% of the accuracy: holds (98.8 ± 0.0%)" in said
    assert "Random experts are clearly worse than clusters: holds (75.6 ± 0.9% beside 98.8" in said
    assert "+23.1 ± 0.9 points by seed" in said and "loses, in points: random 21.9" in said
    assert "gains, in points: clusters +2.5" in said and "clusters 50% (50%)" in said
    assert "a trained router is 20%: clusters, MLP" in said
    said = verdicts([result("clusters", "MLP", 0.7), result("random", "MLP", 0.7)])
    assert "does not hold (87.5%, one seed)" in said and "than clusters: does not hold" in said
    assert "At no share did a trained router keep 97%" in said
    assert verdicts([result("clusters", "oracle", 0.7)]) == ""  # of what was not run nothing is said


def test_a_gap_within_the_spread_of_seeds_is_not_clear():
    near = [result("clusters", "MLP", value, seed) for seed, value in enumerate((0.7, 0.8))]
    random = [result("random", "MLP", 0.7, seed) for seed in (0, 1)]
    assert "than clusters: does not hold" in verdicts([*near, *random])


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
