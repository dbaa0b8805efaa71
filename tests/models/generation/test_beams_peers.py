"""Beam search equals that of transformers: tokens and scores of several hypotheses a prompt."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from modicum.models.generation import beam_search

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("quick_compile")]


def neighbour(name):
    """A module beside this file; tests are no packages."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


peers = neighbour("tiny_peers")


@pytest.fixture(scope="module", params=["gpt2", "llama", "t5-v1.1"])
def pair(request, tmp_path_factory):
    """One model: transformers' and ours, read from its files."""
    return peers.pair(request.param, tmp_path_factory.mktemp(request.param))


CASES = [
    {"early_stopping": False, "length_penalty": 1.0, "num_beams": 4},
    {"early_stopping": True, "length_penalty": 0.0, "num_beams": 3},
    {"early_stopping": "never", "length_penalty": 2.0, "num_beams": 4},
    {"early_stopping": "never", "length_penalty": -1.0, "num_beams": 2},
    {"early_stopping": False, "length_penalty": 0.5, "num_beams": 3, "min_new_tokens": 4},
    {"early_stopping": False, "length_penalty": 1.0, "num_beams": 3, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_beam_search_agrees(pair, case):
    theirs, model, params, start = pair
    texts, stop = peers.prompts(9, 4, 13), list(range(2, 35))
    width, new = 13, 8
    ids = np.zeros((3, width), int)
    for row, text in enumerate(texts):
        ids[row, width - len(text) :] = text
    with torch.no_grad():
        out = theirs.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor((ids > 0).astype(int)),
            do_sample=False,
            max_new_tokens=new,
            num_return_sequences=2,
            eos_token_id=stop,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            **case,
        )
    theirs_tokens = out.sequences[:, 1 if start is not None else width :].numpy()
    options = {name: value for name, value in case.items() if name != "num_beams"}
    got = beam_search(
        model,
        params,
        texts,
        max_new_tokens=new,
        beams=case["num_beams"],
        returned=2,
        stop_tokens=stop,
        decoder_tokens=start,
        pad_token=2,  # what transformers fills with: its pad token 0 counts as none there
        **options,
    )
    assert case["length_penalty"] > 1 or got.lengths.min() < new, (
        "no hypothesis ended early: the case shows little"
    )
    np.testing.assert_array_equal(got.tokens.reshape(6, -1), theirs_tokens)
    np.testing.assert_allclose(got.scores.reshape(-1), out.sequences_scores.numpy(), rtol=2e-4, atol=2e-5)
