"""Greedy continuations of five families equal those of transformers, token for token."""

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


@pytest.fixture(scope="module", params=["gpt2", "llama", "opt", "t5-v1.0", "t5-v1.1"])
def pair(request, tmp_path_factory):
    """One model: transformers' and ours, read from its files."""
    return peers.pair(request.param, tmp_path_factory.mktemp(request.param))


def test_greedy_continuations_agree_for_64_tokens(pair, record_property):
    theirs, model, params, start = pair
    ties = oracle.assert_greedy_equal(model, params, theirs, peers.prompts(9, 4, 23, 1), 64, 0, start)
    record_property("near ties", ties)
    assert ties == 0


def test_the_oracle_notices_a_difference(pair):
    theirs, model, params, start = pair
    other = oracle.varied(params, 1.02)
    with pytest.raises(AssertionError, match="row"):
        oracle.assert_greedy_equal(model, other, theirs, peers.prompts(9, 4, 23, 1), 64, 0, start)
