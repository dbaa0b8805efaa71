"""Runs that a signal ends, and the same command again; `kills.py --kills N` does many."""

import random
import runpy
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def script():
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("kills.py"))))


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """In a folder of its own: a kill may leave half a program there, which nobody replaces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        patch.setenv("JAX_NUM_CPU_DEVICES", "1")
        yield


@pytest.fixture(scope="module")
def corpus(script, tmp_path_factory):
    return script.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def undisturbed(script, corpus):
    out = corpus.parent / "undisturbed"
    assert "the model is in" in script.finish(corpus, out)
    return out


def test_killed_at_random_moments_a_run_comes_to_the_same_end(script, corpus, undisturbed, often):
    out, count = corpus.parent / "killed", often(2, 12)
    assert len(list(script.kill_often(corpus, out, count, random.Random(1)))) == count
    script.finish(corpus, out)
    assert script.difference(out, undisturbed) is None


def test_sigterm_saves_and_the_same_command_goes_on(script, corpus, undisturbed):
    out = corpus.parent / "terminated"
    left, code = script.stop(corpus, out, signal.SIGTERM, 5, 0.0)
    assert code == 128 + signal.SIGTERM
    assert left.stored and not left.writing and not (out / "result.json").exists()
    before = (out / "metrics.jsonl").read_bytes()
    assert f'{{"step": {left.stored[-1]},' in before.decode().splitlines()[-1]  # what was done was saved
    assert "the model is in" in script.finish(corpus, out)
    assert (out / "metrics.jsonl").read_bytes().startswith(before)
    assert script.difference(out, undisturbed) is None


def test_a_difference_is_seen(script, undisturbed, tmp_path):
    for name in script.COMPARED:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((undisturbed / name).read_bytes())
    assert script.difference(tmp_path, undisturbed) is None
    (tmp_path / "result.json").write_text("{}")
    assert script.difference(tmp_path, undisturbed) == "result.json"
