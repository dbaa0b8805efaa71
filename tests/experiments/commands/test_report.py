"""`modicum report`: a page of what the other commands left."""

import pytest


@pytest.fixture
def page(modicum, trained, tmp_path):
    def make(folder):
        path = tmp_path / "pages" / "report.html"
        return modicum("report", folder, "--out", path), path

    return make


def test_a_run_becomes_a_page(page, trained):
    said, path = page(trained)
    assert said.code == 0, said.error
    assert str(path) in said.out
    html = path.read_text()
    assert "<svg" in html and "http-equiv" not in html and "src=" not in html


def test_runs_of_tuning_are_compared(page, tuned):
    said, path = page(tuned.parent)
    assert said.code == 0, said.error
    assert "test_accuracy" in path.read_text() or "test accuracy" in path.read_text()


def test_what_holds_no_run(refused, data, tmp_path):
    missing, out = tmp_path / "missing", tmp_path / "report.html"
    for folder in (missing, data, data / "train.jsonl"):
        assert str(folder) in refused("report", folder, "--out", out)
    assert not out.exists()
