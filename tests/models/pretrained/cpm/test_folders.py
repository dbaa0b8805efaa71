"""Tokenizers of CPM and ChatGLM by their model's folder; ChatGLM's line breaks and spaces."""

import json

import pytest

from modicum import InputError
from modicum.models.pretrained import load_tokenizer
from modicum.models.pretrained.cpm import AntTokenizer, BeeTokenizer
from modicum.models.pretrained.tokenizers.chatglm import ChatGLMTokenizer, read_back, written

WORDS = ["<pad>", "<unk>", "<mask>", "<sep>", "</n>", "</_>", "<s>", "</s>", "<root>", "<ans>", "ab", "a"]


@pytest.mark.parametrize(
    ("settings", "file", "kind"),
    [
        ({"model_type": "cpmant"}, "vocab.txt", AntTokenizer),
        ({"model_type": "cpm-live-ant"}, "ant.txt", AntTokenizer),
        ({"model_type": "cpmbee"}, "vocab.txt", BeeTokenizer),
        ({"model_type": "cpm-live-bee"}, "bee.txt", BeeTokenizer),
    ],
)
def test_a_folder_tells_the_tokenizer(tmp_path, settings, file, kind):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=rf"no vocabulary here; one of .*{file}.* is needed"):
        load_tokenizer(tmp_path)
    (tmp_path / file).write_text("\n".join(WORDS) + "\n", "utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert type(tokenizer) is kind and tokenizer.vocab_size == 12 and tokenizer.decode([6, 10, 5, 7]) == "ab "


def test_whitespace_has_tokens():
    text = "a b  c\n\td" + " " * 85 + "e"
    assert written(text) == "a b<|blank_2|>c<n><|tab|>d<|blank_80|><|blank_5|>e"
    assert read_back(written(text)) == text


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small sentencepiece model with the special tokens of the published one."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("glm")
    (folder / "text").write_text("\n".join(["hello world again", "good morning world", "hello again"] * 20))
    blanks = [f"<|blank_{n}|>" for n in range(2, 81)]
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "ice_text"),
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        user_defined_symbols=["[MASK]", "[gMASK]", "<sop>", "<eop>", "<n>", "<|tab|>", *blanks],
        pad_id=3,
        minloglevel=2,
    )
    (folder / "config.json").write_text('{"model_type": "chatglm"}')
    return folder


@pytest.mark.peers
@pytest.mark.parametrize("offset", [0, 20_000])
def test_chatglm_ends_prompts_with_a_mask(model, offset):
    (model / "tokenizer_config.json").write_text(json.dumps({"num_image_tokens": offset}))
    tokenizer = load_tokenizer(model)
    assert isinstance(tokenizer, ChatGLMTokenizer)
    gmask, sop = tokenizer.number("[gMASK]"), tokenizer.number("<sop>")
    ids = tokenizer.encode("hello  world\nagain")
    assert ids[-2:] == [gmask, sop] and min(ids) >= offset and tokenizer.bos == sop
    assert tokenizer.decode(ids) == "hello  world\nagain"
    assert "[gMASK]<sop>" in tokenizer.decode(ids, special=True).replace(" ", "")
    masked = tokenizer.encode("hello [MASK] again")
    assert gmask not in masked and masked.count(tokenizer.number("[MASK]")) == 1 and masked[-1] == sop
    assert tokenizer.encode("hello", special=False) == ids[: len(tokenizer.encode("hello", special=False))]
    assert len(tokenizer.encode_batch(["hello world again"], length=4)[0][0]) == 4
    assert tokenizer.pad == 3 + offset and tokenizer.eos == tokenizer.number("<eop>")


@pytest.mark.peers
def test_another_model_is_refused(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("hello world again\n" * 9)
    prefix = str(tmp_path / "ice_text")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=prefix,
        vocab_size=20,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(InputError, match=r"has no \[MASK\], \[gMASK\], <sop>, <eop>: it is not ChatGLM-6B's"):
        ChatGLMTokenizer.read(f"{prefix}.model")
