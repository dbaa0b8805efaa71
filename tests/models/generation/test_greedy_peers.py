"""Greedy continuations of eight models equal those of transformers, token for token."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("quick_compile")]


def neighbour(name):
    """A module beside this file; tests are no packages."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle, peers = neighbour("greedy_oracle"), neighbour("tiny_peers")


NAMES = ["gpt2", "llama", "mistral", "qwen3", "opt", "opt-350m", "t5-v1.0", "t5-v1.1"]


@pytest.fixture(scope="module", params=NAMES)
def pair(request, tmp_path_factory):
    """One model: transformers' and ours, read from its files."""
    return peers.pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("penalty", [1.0, 4.0])
def test_greedy_continuations_agree_for_64_tokens(pair, penalty, record_property):
    """With a repetition penalty too: random models repeat themselves, which would hide much."""
    theirs, model, params, start = pair
    texts = peers.prompts(9, 4, 23, 1)
    ties = oracle.assert_greedy_equal(model, params, theirs, texts, 64, 0, start, penalty)
    record_property("near ties", ties)
    assert ties == 0
    if penalty > 1:
        tokens, _ = oracle.peer_greedy(theirs, texts, 64, 0, start, penalty)
        assert min(len(set(row.tolist())) for row in tokens) > 15, "the texts repeat: the test shows little"


def test_the_oracle_notices_a_difference(pair):
    """Two percent on the matrices is enough."""
    theirs, model, params, start = pair
    other = oracle.varied(params, 1.02)
    with pytest.raises(AssertionError, match="row"):
        oracle.assert_greedy_equal(model, other, theirs, peers.prompts(9, 4, 23, 1), 64, 0, start, 4.0)
