"""A run in a process of its own, killed and terminated; `killed_training.py --kills N` does many."""

import random
import runpy
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def script():
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("killed_training.py"))))


@pytest.fixture(scope="module")
def undisturbed(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert script.finish(folder)[-1] == "finished"
    return folder


def test_killed_at_random_moments_a_run_comes_to_the_same_end(script, undisturbed, often):
    folder, count = undisturbed.parent / "killed", often(2, 12)
    kills = list(script.kill_often(folder, count, random.Random(0)))
    assert len(kills) == count
    assert script.finish(folder)[-1] == "finished"
    assert script.difference(undisturbed, folder) is None


def test_sigterm_saves_first(script, undisturbed):
    folder = undisturbed.parent / "terminated"
    left, code = script.stop(folder, 7, 0.0, signal.SIGTERM)
    assert code == 0
    records = (folder / "metrics.jsonl").read_bytes().splitlines()
    assert left.stored[-1] >= 7 and not left.writing
    said = script.finish(folder)
    assert said[0] == str(left.stored[-1] + 1)  # no step is done twice
    assert (folder / "metrics.jsonl").read_bytes().splitlines()[: len(records)] == records
    assert script.difference(undisturbed, folder) is None


def test_a_difference_is_seen(script, undisturbed, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        (undisturbed / "metrics.jsonl").read_bytes().replace(b"1", b"2", 1)
    )
    assert script.difference(undisturbed, tmp_path) == "metrics.jsonl differs in line 1"
