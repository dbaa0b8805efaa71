"""Loading without peers: which file is read, what is put around a text, and what is refused."""

import json
import shutil
import sys

import numpy as np
import pytest

from modicum import InputError
from modicum.models.pretrained.tokenizers import load_tokenizer


@pytest.fixture
def folder(tmp_path, request):
    """A copy of a folder of the session, free to be changed."""

    def copy(name):
        target = tmp_path / "model"
        shutil.copytree(request.getfixturevalue(name), target)
        return target

    return copy


def write(folder, name, value):
    (folder / name).write_text(json.dumps(value))


def test_pairs_come_back_exactly(pairs_folder, folder, hard_texts):
    path = folder("pairs_folder")
    write(path, "config.json", {"model_type": "gpt2"})
    tokenizer = load_tokenizer(path)
    for text in hard_texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.bos == tokenizer.eos == tokenizer.pad == 5
    assert tokenizer.encode("<|endoftext|>") == [5]
    assert tokenizer.decode([5]) == "" and tokenizer.decode([5], special=True) == "<|endoftext|>"
    assert tokenizer.vocab_size == 700


def test_opt_begins_with_its_end_token(folder):
    path = folder("pairs_folder")
    write(path, "config.json", {"model_type": "opt"})
    names = {"bos_token": "</s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": "<pad>"}
    write(path, "tokenizer_config.json", {"add_bos_token": True, **names})
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("good")[0] == tokenizer.bos == tokenizer.eos == 2
    assert tokenizer.pad == 1
    assert tokenizer.encode("good", special=False) == tokenizer.encode("good")[1:]


def test_batch_pads_cuts_and_keeps_the_ends(folder):
    path = folder("pieces_folder")
    write(path, "config.json", {"model_type": "bert"})
    tokenizer = load_tokenizer(path)
    first, last = tokenizer.encode("")
    texts = ["good", "a very good film and then some more words", ""]
    tokens, segments = tokenizer.encode_batch(texts, length=7)
    assert tokens.shape == segments.shape == (3, 7) and tokens.dtype == np.int32
    assert segments.sum(1).tolist() == [len(tokenizer.encode("good")), 7, 2]
    for row, real in zip(tokens, segments, strict=True):
        kept = row[real > 0]
        assert kept[0] == first and kept[-1] == last
    assert (tokens[segments == 0] == tokenizer.pad).all()
    left, left_segments = tokenizer.encode_batch(texts, side="left")
    assert left_segments[0].tolist() == sorted(left_segments[0].tolist())
    assert left[2, -2:].tolist() == [first, last]
    assert left.shape[1] == len(tokenizer.encode(texts[1]))


def test_sentinels_count_down_from_the_end(t5_folder):
    tokenizer = load_tokenizer(t5_folder)
    size = tokenizer.vocab_size
    assert tokenizer.encode("<extra_id_0>", special=False) == [size - 1]
    assert tokenizer.encode("<extra_id_99>", special=False) == [size - 100]
    assert tokenizer.encode("good")[-1] == tokenizer.eos == 1
    assert tokenizer.pad == 0 and tokenizer.bos is None
    tokens, segments = tokenizer.encode_batch(["good film about films"], length=3)
    assert tokens[0, -1] == 1 and segments.sum() == 3
    assert tokenizer.decode(tokenizer.encode("good <extra_id_1> film")) == "good film"


def test_llama_begins_with_a_token_and_falls_back_on_bytes(llama_folder, folder):
    tokenizer = load_tokenizer(llama_folder)
    ids = tokenizer.encode("a 👩 b")
    assert ids[0] == tokenizer.bos == 1
    assert tokenizer.decode(ids) == "a 👩 b"
    path = folder("llama_folder")
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": True}
    write(path, "tokenizer_config.json", settings)
    ids = load_tokenizer(path).encode("a")
    assert ids[0] != 1 and ids[-1] == 2


@pytest.mark.parametrize(
    ("source", "settings", "words"),
    [
        ("pairs_folder", {}, ["no tokenizer class", "GPT2Tokenizer", "tokenizer.json"]),
        ("pairs_folder", {"tokenizer_class": "Qwen2TokenizerFast"}, ["Qwen2Tokenizer", "vocab.json"]),
        ("t5_folder", {"tokenizer_class": "AlbertTokenizer"}, ["AlbertTokenizer", "spiece.model"]),
        ("pairs_folder", {"tokenizer_class": "GPT2Tokenizer", "pad_token": "[PAD]"}, ["'[PAD]'", "no id"]),
        (
            "pairs_folder",
            {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": {"900": {"content": "<new>"}}},
            ["'<new>'", "900", "gap"],
        ),
    ],
)
def test_what_the_files_do_not_tell_is_refused(folder, source, settings, words):
    path = folder(source)
    write(path, "tokenizer_config.json", settings)
    with pytest.raises(InputError) as error:
        load_tokenizer(path)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_added_tokens_take_the_next_ids(folder):
    path = folder("pairs_folder")
    added = {"700": {"content": "<new>"}, "701": {"content": "<other>"}}
    write(path, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": added})
    tokenizer = load_tokenizer(path)
    assert 700 in tokenizer.encode("a<new>b") and tokenizer.vocab_size == 702


def test_unusable_files_are_one_line(tmp_path):
    with pytest.raises(InputError, match="no tokenizer here; one of"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="not a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(InputError, match="a list; an object is valid"):
        load_tokenizer(tmp_path)


def test_pairs_and_whose_token_it_is(folder):
    path = folder("pieces_folder")
    write(path, "config.json", {"model_type": "bert"})
    tokenizer = load_tokenizer(path)
    tokens, segments, types = tokenizer.encode_pairs(["good", "a good film"], ["bad", "a bad one"])
    one, two = tokenizer.encode("good"), tokenizer.encode("bad")
    real = segments[0] > 0
    assert tokens[0][real].tolist() == [*one, *two[1:]]
    assert types[0][real].tolist() == [0] * len(one) + [1] * (len(two) - 1)
    assert not types[segments == 0].any()
    with pytest.raises(InputError, match="1 first and 2 second texts"):
        tokenizer.encode_pairs(["a"], ["b", "c"])


def test_bad_batches(pieces_folder, folder):
    path = folder("pieces_folder")
    write(path, "config.json", {"model_type": "bert"})
    tokenizer = load_tokenizer(path)
    with pytest.raises(InputError, match="side='middle'"):
        tokenizer.encode_batch(["a"], side="middle")
    with pytest.raises(InputError, match="texts is empty"):
        tokenizer.encode_batch([])
    with pytest.raises(InputError, match="length=2 must be above 2"):
        tokenizer.encode_batch(["a"], length=2)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer"})
    (tmp_path / "spiece.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(InputError, match="pip install sentencepiece"):
        load_tokenizer(tmp_path)


def test_a_damaged_sentencepiece_model(tmp_path):
    pytest.importorskip("sentencepiece")
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer"})
    (tmp_path / "spiece.model").write_bytes(b"no model")
    with pytest.raises(InputError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path)
