"""A tokenizer that loses nothing, is the same every time and keeps special tokens out of texts."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from modicum import InputError
from modicum.research.data.tokenizers import Tokenizer, train_tokenizer

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "naïve café 北京 \U0001f600\n\tdef f(x):\n"] * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 280)


def test_every_text_comes_back(tokenizer: Tokenizer) -> None:
    texts = [*TEXTS[:3], "", " ", "unseen Ω \x00 \r\n", "<eos> and <pad> are text"]
    encoded = tokenizer.encode(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert all(ids.dtype == np.int32 for ids in encoded)
    assert max(ids.max(initial=0) for ids in encoded) < tokenizer.vocab == 280


def test_special_tokens_have_fixed_ids_and_never_come_from_text(tokenizer: Tokenizer) -> None:
    assert (tokenizer.pad, tokenizer.eos) == (0, 1)
    (ids,) = tokenizer.encode(["<pad><eos>the cat<eos>"])
    assert not np.isin(ids, [0, 1]).any()
    assert tokenizer.decode([0, 1]) == ""
    more = train_tokenizer(TEXTS, 280, special=["<user>"])
    assert more.inner.token_to_id("<user>") == 2


def test_merges_shorten_what_was_frequent(tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer.encode(["the cat sat on the mat"])
    assert len(ids) < 12


def test_saved_and_loaded_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "tokenizer.json"
    tokenizer.save(path)
    again = Tokenizer.load(path)
    text = "<eos> the dog café"
    assert again.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(again.encode([text])[0], tokenizer.encode([text])[0])
    assert [path.name for path in path.parent.iterdir()] == ["tokenizer.json"]


def test_the_same_text_gives_the_same_tokenizer_in_another_process(tokenizer: Tokenizer) -> None:
    script = (
        "from modicum.research.data.tokenizers import train_tokenizer as t;"
        f"print(t({TEXTS!r}, 280).fingerprint)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == tokenizer.fingerprint
    assert train_tokenizer(TEXTS, 281).fingerprint != tokenizer.fingerprint


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="vocab is 200; at least 258 is valid"):
        train_tokenizer(TEXTS, 200)
    with pytest.raises(InputError, match="no text to train"):
        train_tokenizer(["", ""], 280)
    with pytest.raises(InputError, match="no such tokenizer file"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(InputError, match=r"not a tokenizer\.json"):
        Tokenizer.load(tmp_path / "bad.json")
    train_tokenizer(TEXTS, 280).save(tmp_path / "good.json")
    with pytest.raises(InputError, match="has no token '<s>'"):
        Tokenizer.load(tmp_path / "good.json", eos="<s>")
