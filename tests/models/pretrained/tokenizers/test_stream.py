"""Pieces of a stream are whole characters and concatenate to the decoded text."""

import json
import shutil

import numpy as np
import pytest

from modicum.models.pretrained.tokenizers import TextStream, load_tokenizer, stream_text


@pytest.fixture(params=["pairs_folder", "llama_folder", "t5_folder"])
def tokenizer(request, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(request.getfixturevalue(request.param), folder)
    if request.param == "pairs_folder":
        (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return load_tokenizer(folder)


def test_pieces_are_the_text(tokenizer, hard_texts):
    for text in hard_texts:
        ids = tokenizer.encode(text)
        pieces = list(stream_text(tokenizer, ids))
        assert "".join(pieces) == tokenizer.decode(ids)
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_pieces_come_as_soon_as_they_can(pairs_folder, tmp_path):
    shutil.copytree(pairs_folder, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    tokenizer = load_tokenizer(tmp_path / "model")
    stream = TextStream(tokenizer)
    assert [stream.push(each) for each in tokenizer.encode("!")] == ["!"]
    emoji = tokenizer.encode("👩", special=False)
    assert len(emoji) > 1
    assert [stream.push(each) for each in emoji[:-1]] == [""] * (len(emoji) - 1)
    assert stream.push(tokenizer.eos) == ""
    assert stream.push(emoji[-1]) == "👩"
    assert stream.push(emoji[0]) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"
    assert stream.finish() == ""


def test_pieces_continue_the_text_before(tokenizer, hard_texts):
    for text in hard_texts:
        ids = tokenizer.encode(text, special=False)
        for cut in {len(ids) // 3, 2 * len(ids) // 3}:
            first = tokenizer.decode(ids[:cut])
            if not first.strip() or first.endswith("\N{REPLACEMENT CHARACTER}"):
                continue  # a prompt has something to say, in whole characters
            pieces = stream_text(tokenizer, ids[cut:], before=tokenizer.encode("")[:1] + ids[:cut])
            assert first + "".join(pieces) == tokenizer.decode(ids)


def test_any_ids(tokenizer):
    rng = np.random.default_rng(0)
    for length in (1, 3, 40):
        for _ in range(10):
            ids = rng.integers(0, tokenizer.vocab_size, length).tolist()
            assert "".join(stream_text(tokenizer, ids)) == tokenizer.decode(ids)
