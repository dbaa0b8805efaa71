"""The study of sparse activation on its smallest size, resumed; its tables and its words on known figures."""

from dataclasses import replace

import numpy as np
import pytest

from modicum import InputError
from modicum.experiments.sparse_activation import SIZES, Decoder, Study, sweep
from modicum.experiments.sparse_activation_report import apart, introduction, write_sparse_activation
from modicum.experiments.sparse_activation_verdicts import verdicts
from modicum.experiments.sparse_activation_work import GRID, Noise
from modicum.models import GatedMLP, StatisticalTopK, TopK


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, quick_compile):
    folder = tmp_path_factory.mktemp("study")
    text = "the cat sat on the mat and saw the dog . it was a fine day , said the old man to the boy . "
    for name, splits in {
        "wikitext2_valid_test": ("valid", "test"),
        "tinyshakespeare": ("train", "valid"),
    }.items():
        (folder / "data" / name).mkdir(parents=True)
        for split in splits:
            (folder / "data" / name / f"{split}.txt").write_text(text * 40)
    smallest = replace(SIZES["smoke"], neurons=(), kept=(8,), data=())
    study = Study(folder / "runs", folder / "data", smallest)
    return study, study.run()


def test_every_cell_is_run_once_and_found_again(smoke):
    study, results = smoke
    assert [one["activation"] for one in results] == ["relu", TopK(8), StatisticalTopK(8)]
    exact = results[1]
    assert exact["active"] <= 8 / 64 and exact["cumulative"][round(8 / 64 * 200)] == 1.0
    assert [one["step"] for one in exact["steps"]] == [0, 2, 4]
    files = {path: path.stat().st_mtime_ns for path in study.folder.rglob("result.json")}
    assert len(files) == 3 and study.run() == results
    assert files == {path: path.stat().st_mtime_ns for path in study.folder.rglob("result.json")}
    more = replace(study, size=replace(study.size, seeds=(0, 1)), finished=True)
    assert more.run() == results  # the other seed is not run
    with pytest.raises(InputError, match="no cell of this size is finished"):
        replace(more, size=replace(more.size, seeds=(1,))).run()


def test_tables_and_figures_are_written(smoke, tmp_path):
    _, results = smoke
    text = write_sparse_activation(tmp_path, results, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert text in page and "This page has 3 cells: 3 of seed 0." in page
    assert "![quality](page/quality.svg)" in page and (tmp_path / "page" / "quality.svg").exists()
    assert "| top-k, k=8" in text and "| trained on" in text and "## What holds" in text
    names = sorted(each.name for each in (tmp_path / "figures").iterdir())
    assert names == ["inputs.svg", "neurons.svg", "quality.svg", "steps.svg"]
    assert (tmp_path / "tables" / "sizes.csv").exists()


def cell(**given):
    """A result that was not measured."""
    found = {**vars(Decoder()), "F": 256, "loss": 4.0, "active": 0.3, "below 5%": 0.1, "ever active": 1.0}
    steps = [{"step": 0, "active": 0.5}, {"step": 9, "active": given.get("active", 0.3)}]
    base = not given.keys() - {"seed", "loss", "active"}
    return {**found, "steps": steps, "cumulative": [0.0] * len(GRID), "base": base, **given}


def test_verdicts_say_what_the_figures_say():
    deep = cell(layers=8, active=0.1, **{"below 5%": 0.85})
    noisy = cell(data="random labels", active=0.51)
    cheap, poor = cell(activation=TopK(16), active=0.06), cell(activation=TopK(8), active=0.03, loss=4.1)
    soft = cell(activation=StatisticalTopK(8), loss=4.2, active=0.04)
    said = verdicts([cell(), deep, noisy, cheap, poor, soft])
    assert (
        "less than 5% of the neurons: holds at this scale (at most 85.0% of the inputs, of 2 sizes; one seed)"
        in said
    )
    assert "active for some input: holds at this scale (at least 100.0%; one seed)" in said
    assert "deeper are sparser: holds at this scale (layers 4: 30.0%, 8: 10.0%; one seed)" in said
    assert "text makes neurons silent: holds at this scale (50.0% to 30.0% active; one seed)" in said
    assert "random labels makes neurons silent: does not hold at this scale" in said
    assert "Top-k reaches ReLU's loss with fewer neurons: holds at this scale (k=16: 6.0%" in said
    assert "Statistical top-k reaches ReLU's loss: does not hold at any k that was tried (one seed)" in said
    seeds = [cell(seed=0), cell(seed=1, active=0.2), cell(layers=8, active=0.24)]
    assert "deeper are sparser: does not hold" in verdicts(seeds)  # within two deviations
    assert "wider" not in verdicts(seeds)
    more = verdicts([cell(), cell(neurons=1024, F=1024, active=0.2)])
    assert "2.7 times as many are active (77 of 256, 205 of 1024; one seed)" in more


def test_statements_say_on_how_many_seeds_they_stand():
    both = [cell(), cell(seed=1)]
    deep = cell(layers=8, active=0.1)
    assert "(50.0% to 30.0% active; 2 seeds)" in verdicts([*both, deep])
    assert "(layers 4: 30.0%, 8: 10.0%; 1 to 2 seeds)" in verdicts([*both, deep])
    assert "8: 10.0%; 2 seeds)" in verdicts([*both, deep, {**deep, "seed": 1}])
    for line in verdicts([*both, deep, cell(activation=TopK(8))]).splitlines():
        assert "seed" in line


def test_a_step_just_before_the_last_is_not_shown():
    assert apart([0, 133, 266, 399, 532, 665, 798, 800]) == [0, 1, 2, 3, 4, 5, 7]
    assert apart([0, 50, 100]) == [0, 1, 2] and apart([0, 4]) == [0, 1]


def test_the_base_is_found_by_its_values_and_missed_in_one_line(smoke, tmp_path):
    deep, other = cell(layers=8, active=0.1), cell(seed=1)
    assert verdicts([deep, other]) == verdicts([other, deep])
    _, results = smoke
    assert [one["base"] for one in results] == [True, False, False]
    assert introduction(results[::-1]) == introduction(results)
    with pytest.raises(InputError, match="with which 2 finished cells are compared, is not finished"):
        write_sparse_activation(tmp_path, results[1:], tmp_path / "page.md")
    assert not list(tmp_path.iterdir())


def test_a_cell_says_what_it_trains():
    gated = Decoder(activation="drelu")
    assert gated.mlp == GatedMLP(170, "drelu") and gated.site == "mlp/mid"
    prices = Decoder(penalty=2.0).prices
    assert [prices.price(step) for step in (0, 30, 150, 299)] == [0.0, 0.0, 2.0, 2.0]
    cells = sweep(SIZES["full"])
    assert len({str(one) for one in cells}) == len(cells) and cells[0] == {"seed": 0}
    assert [one["seed"] for one in cells] == sorted(one["seed"] for one in cells)


def test_noise_is_a_rows_own():
    rows = [{"tokens": np.arange(4), "targets": np.arange(1, 5), "weights": np.ones(4)}] * 3
    labels, both = Noise(rows, 50, False), Noise(rows, 50, True)
    np.testing.assert_array_equal(labels[1]["targets"], both[1]["targets"])
    np.testing.assert_array_equal(both[1]["tokens"][1:], both[1]["targets"][:-1])
    np.testing.assert_array_equal(labels[1]["tokens"], rows[1]["tokens"])
    assert (labels[0]["targets"] != labels[1]["targets"]).any() and len(both) == 3
    held_out = Noise(rows, 50, True, side=1)
    assert (held_out[1]["tokens"] != both[1]["tokens"]).any()  # measured on what was not trained on
