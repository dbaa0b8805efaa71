"""Small tokenizers trained on real text, in the files that published models come with."""

import json

import pytest
import tokenizers as hf


@pytest.fixture(scope="session")
def sentences(shared_data):
    """Lines of English and Chinese."""
    english = (shared_data / "sst2" / "train.jsonl").read_text("utf-8").splitlines()[:1500]
    chinese = (shared_data / "zh_poetry" / "valid.jsonl").read_text("utf-8").splitlines()[:100]
    return [json.loads(line)["text"] for line in english] + [
        next(value for value in json.loads(line).values() if isinstance(value, str)) for line in chinese
    ]


@pytest.fixture(scope="session")
def hard_texts(sentences):
    """What tokenizers trip over: spaces, accents, emoji, control characters, special tokens, nothing."""
    return [
        *sentences[::40],
        "",
        " ",
        "  two  spaces and a\ttab\n\nand lines ",
        "Çà et là, naïve façades — “quoted” … ﬁne ½",
        "emoji 👩‍🔬🇨🇳 and 한국어 and \u200b zero width",
        "don't, can't; it 's I'm . , !",
        "a" * 120,
        "床前明月光,疑是地上霜。",
    ]


@pytest.fixture(scope="session")
def pairs_folder(sentences, tmp_path_factory):
    """GPT-2's files: vocab.json and merges.txt."""
    folder = tmp_path_factory.mktemp("pairs")
    inner = hf.Tokenizer(hf.models.BPE())
    inner.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"]
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    trainer = hf.trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(sentences, trainer)
    inner.model.save(str(folder))
    return folder


@pytest.fixture(scope="session")
def pieces_folder(sentences, tmp_path_factory):
    """BERT's file: vocab.txt."""
    folder = tmp_path_factory.mktemp("pieces")
    inner = hf.BertWordPieceTokenizer()
    inner.train_from_iterator(sentences, vocab_size=900, show_progress=False)
    inner.save_model(str(folder))
    return folder


def train_sentences(folder, name, sentences, **options):
    """Train a sentencepiece model into `folder/name`."""
    sentencepiece = pytest.importorskip("sentencepiece")
    with (folder / name).open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=file,
            num_threads=1,
            minloglevel=2,
            hard_vocab_limit=False,
            **options,
        )
    return folder


@pytest.fixture(scope="session")
def t5_folder(sentences, tmp_path_factory):
    """T5's spiece.model: padding 0, end 1, unknown 2."""
    folder = tmp_path_factory.mktemp("t5")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    numbers = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    options = {"model_type": "unigram", "vocab_size": 800, "character_coverage": 0.99}
    return train_sentences(folder, "spiece.model", sentences, **options, **numbers)


@pytest.fixture(scope="session")
def llama_folder(sentences, tmp_path_factory):
    """LLaMA's tokenizer.model: byte pairs that fall back on bytes."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    options = {"model_type": "bpe", "vocab_size": 900, "byte_fallback": True, "character_coverage": 0.99}
    rules = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "split_digits": True}
    return train_sentences(folder, "tokenizer.model", sentences, **options, **rules)
