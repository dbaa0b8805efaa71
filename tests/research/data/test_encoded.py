"""Texts and pairs in a published model's tokens: special tokens, token types, lengths, templates."""

import datasets
import pytest
import tokenizers as hf

from modicum import InputError
from modicum.models.pretrained.tokenizers import SpecialTokens, load_tokenizer
from modicum.models.pretrained.tokenizers.fast import FastTokenizer, surround
from modicum.research.data.batches import Batches
from modicum.research.data.encoded import encode_examples, same_length
from modicum.research.data.examples import Labels
from modicum.research.data.sources import Source
from modicum.research.data.templates import Template

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "e", "f"]
ROWS = {"first": ["a b", "c"], "second": ["d", "e f a b"], "label": [1, 0], "count": [3, 4]}


@pytest.fixture
def source() -> Source:
    return Source("pairs.jsonl", "train", datasets.Dataset.from_dict(ROWS), "first", "label", "0" * 16)


@pytest.fixture
def labels(source) -> Labels:
    return Labels.of(source)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return load_tokenizer(folder)


def words(before=(), after=(), between=()):
    """A tokenizer that knows the words and puts these tokens around them."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    inner = hf.Tokenizer(hf.models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    if before or after:
        surround(inner, before, after, between)
    return FastTokenizer(inner, SpecialTokens(0, None, 3, frozenset({0, 3})), pairs=bool(between))


def spelled(row):
    return [WORDS[token] for token in row["tokens"][row["segments"] > 0]]


def test_one_text(source, labels, bert):
    rows = encode_examples(source, bert, labels)
    assert [spelled(rows[i]) for i in range(2)] == [["[CLS]", "a", "b", "[SEP]"], ["[CLS]", "c", "[SEP]"]]
    assert rows.length == 8 and "token_types" not in rows[0]
    assert (rows[0]["tokens"][4:] == 0).all() and rows[0]["segments"].tolist() == [1] * 4 + [0] * 4
    assert [int(rows[i]["label"]) for i in range(2)] == [1, 0]


def test_pairs_as_bert_reads_them(source, labels, bert):
    rows = encode_examples(source, bert, labels, 9, pair_column="second")
    assert spelled(rows[1]) == ["[CLS]", "c", "[SEP]", "e", "f", "a", "b", "[SEP]"]
    assert rows[1]["token_types"].tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 0]
    batch = Batches(rows, 2)[0]
    assert batch["token_types"].shape == (2, 9) and batch["token_types"].dtype == "int32"
    assert (
        "token_types" not in encode_examples(source, bert, labels, pair_column="second", token_types=False)[0]
    )


def test_pairs_as_roberta_reads_them(source, labels):
    tokenizer = words(["[CLS]"], ["[SEP]"], ["[SEP]", "[SEP]"])
    rows = encode_examples(source, tokenizer, labels, pair_column="second")
    assert spelled(rows[0]) == ["[CLS]", "a", "b", "[SEP]", "[SEP]", "d", "[SEP]"]
    assert "token_types" not in rows[0]


def test_the_longer_text_of_a_pair_is_cut_first(source, labels, bert):
    with pytest.raises(
        InputError, match=r"pairs\.jsonl: row 2 has 8 tokens, the longest allowed 6; .*--trunc"
    ):
        encode_examples(source, bert, labels, 6, pair_column="second")
    rows = encode_examples(source, bert, labels, 6, pair_column="second", truncate=True)
    assert spelled(rows[1]) == ["[CLS]", "c", "[SEP]", "e", "f", "[SEP]"]
    assert spelled(rows[0]) == ["[CLS]", "a", "b", "[SEP]", "d", "[SEP]"]


def test_a_decoder_reads_up_to_its_end_token(source, labels):
    plain, begun = words(), words(["[CLS]"])
    assert spelled(encode_examples(source, plain, labels, end=3)[0]) == ["a", "b", "[SEP]"]
    assert spelled(encode_examples(source, begun, labels, end=3)[0]) == ["[CLS]", "a", "b", "[SEP]"]
    closed = words([], ["[SEP]"])
    assert spelled(encode_examples(source, closed, labels, end=3)[0]) == ["a", "b", "[SEP]"]
    both = encode_examples(source, begun, labels, pair_column="second", end=3, token_types=False)
    assert spelled(both[0]) == ["[CLS]", "a", "b", "[SEP]", "d", "[SEP]"]
    cut = encode_examples(source, begun, labels, 6, pair_column="second", end=3, truncate=True)
    assert spelled(cut[1]) == ["[CLS]", "c", "[SEP]", "e", "f", "[SEP]"]
    assert spelled(encode_examples(source, plain, labels, 2, end=3, truncate=True)[0]) == ["a", "[SEP]"]


def test_splits_are_padded_alike(source, labels, bert):
    short, long = (encode_examples(source, bert, labels, n) for n in (4, 20))
    splits = same_length({"train": short, "dev": encode_examples(source, bert, labels, pair_column="second")})
    assert {rows.length for rows in splits.values()} == {8}
    assert {rows.length for rows in same_length({"a": short, "b": long}, 30).values()} == {30}
    few = encode_examples(source, words(), labels, 5, end=3)
    assert same_length({"train": few})["train"].length == 5  # of a model with five positions


def test_templates(source, labels):
    template = Template("{first} e {second}{{}}")
    assert template.columns == ("first", "second")
    assert template.texts(source) == ["a b e d{}", "c e e f a b{}"]
    rows = encode_examples(source, words(), labels, template="{second} f {first}", end=3)
    assert spelled(rows[0]) == ["d", "f", "a", "b", "[SEP]"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no column", "names no column"),
        ("{first", "template '{first': "),
        ("{}", "only the name of a column may be in braces"),
        ("{first!r}", "only the name of a column may be in braces"),
        ("{first:>9}", "only the name of a column may be in braces"),
    ],
)
def test_templates_that_cannot_be(text, reason):
    with pytest.raises(InputError) as caught:
        Template(text)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_pair_needs(source, labels, bert):
    with pytest.raises(
        InputError, match=r"^pairs\.jsonl: no column 'third'; the columns are: first, second, "
    ):
        encode_examples(source, bert, labels, pair_column="third")
    with pytest.raises(InputError, match=r"column 'count' holds int64, not text"):
        Template("{count}").texts(source)
    with pytest.raises(InputError, match="no form for pairs of texts"):
        encode_examples(source, words(), labels, pair_column="second")
    with pytest.raises(InputError, match="the template names columns"):
        encode_examples(source, bert, labels, pair_column="second", template="{first}")


def test_a_text_without_tokens(labels):
    rows = datasets.Dataset.from_dict({"first": ["a", ""], "label": [0, 1]})
    source = Source("pairs.jsonl", "train", rows, "first", "label", "0" * 16)
    with pytest.raises(InputError, match=r"^pairs\.jsonl: row 2 has no token of this model's vocabulary$"):
        encode_examples(source, words(), labels)
