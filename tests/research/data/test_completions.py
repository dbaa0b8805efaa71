"""Prompts and what is to be written: where the loss counts, for decoders and encoder-decoders."""

import datasets
import numpy as np
import pytest
import tokenizers as hf

from modicum import InputError
from modicum.models.pretrained.tokenizers import SpecialTokens
from modicum.models.pretrained.tokenizers.fast import FastTokenizer, surround
from modicum.research.data.completions import encode_completions, same_lengths
from modicum.research.data.sources import Source
from modicum.research.data.tokenizers import train_tokenizer

WORDS = ["<pad>", "<unk>", "<s>", "</s>", "good", "bad", "film", "it", "was", "very", ":"]
PAD, BEGIN, END = 0, 2, 3
ROWS = {"text": ["good film", "it was very bad"], "answer": ["very good", "bad"], "other": ["film", "it"]}


def words(before=(), after=()):
    inner = hf.Tokenizer(hf.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    if before or after:
        surround(inner, before, after)
    return FastTokenizer(inner, SpecialTokens(PAD, BEGIN, END, frozenset({0, 2, 3})))


@pytest.fixture
def source():
    return Source("texts.jsonl", "train", datasets.Dataset.from_dict(ROWS), "text", None, "0" * 16)


def spelled(ids):
    return " ".join(WORDS[int(each)] for each in ids)


def test_rows_are_no_longer_than_they_may_be(source):
    rows = encode_completions(source, words(), 7, target_column="answer", end=END)
    assert rows.lengths == (7, 0) and rows[0]["tokens"].shape == (7,)


def test_a_decoder_learns_what_comes_after_the_prompt(source):
    rows = encode_completions(source, words(["<s>"]), target_column="answer", template="{text} :", end=END)
    assert len(rows) == 2 and rows.lengths == (8, 0)
    row = rows[0]
    real = row["segments"] > 0
    assert spelled(row["tokens"][real]) == "<s> good film : very good"
    assert spelled(row["targets"][real]) == "good film : very good </s>"
    assert spelled(row["targets"][row["weights"] > 0]) == "very good </s>"
    assert (row["weights"][~real] == 0).all() and row["positions"].tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
    assert spelled(rows.prompts[1]) == "<s> it was very bad :" and spelled(rows.completions[1]) == "bad </s>"
    assert {name: field.dtype.name for name, field in row.items()} == {
        **dict.fromkeys(("tokens", "segments", "positions", "targets"), "int32"),
        "weights": "float32",
    }


def test_an_end_that_the_tokenizer_puts_is_put_once(source):
    rows = encode_completions(source, words([], ["</s>"]), target_column="answer", end=END)
    assert spelled([*rows.prompts[0], *rows.completions[0]]) == "good film very good </s>"


def test_words_in_a_text_keep_the_space_before_them(source):
    own = train_tokenizer(["good film very good it was very bad film: bad"] * 3, 300)
    tokenizer = FastTokenizer(own.inner, SpecialTokens(own.pad, None, own.eos))
    rows = encode_completions(source, tokenizer, target_column="answer", template="{text}:", end=own.eos)
    for text, prompt, completion in zip(ROWS["text"], rows.prompts, rows.completions):
        assert tokenizer.decode(prompt) == f"{text}:" and completion[-1] == own.eos
        assert list(prompt) + list(completion[:-1]) == tokenizer.encode(
            tokenizer.decode([*prompt, *completion])
        )
    assert tokenizer.decode(rows.completions[0][:-1]) == " very good"
    spaced = encode_completions(source, tokenizer, target_column="answer", template="{text}:\n", end=own.eos)
    assert tokenizer.decode([*spaced.prompts[1], *spaced.completions[1]]) == "it was very bad:\nbad"


def test_an_encoder_decoder_reads_the_prompt_in_its_encoder(source):
    tokenizer = words([], ["</s>"])
    rows = encode_completions(source, tokenizer, target_column="answer", end=END, start=PAD)
    row = rows[0]
    assert spelled(row["tokens"][row["segments"] > 0]) == "good film </s>"
    assert spelled(row["decoder_tokens"][row["decoder_segments"] > 0]) == "<pad> very good"
    assert spelled(row["targets"][row["weights"] > 0]) == "very good </s>"
    assert rows.lengths == (8, 8) and row["decoder_positions"].shape == (8,)


def test_prompts_are_cut_where_they_begin(source):
    options = {"target_column": "answer", "template": "{text} :", "end": END}
    with pytest.raises(InputError, match=r"^texts\.jsonl: row 1's prompt and target have 7 tokens, the long"):
        encode_completions(source, words(["<s>"]), 6, **options)
    rows = encode_completions(source, words(["<s>"]), 6, truncate=True, **options)
    assert spelled(rows.prompts[0]) == "<s> film :" and spelled(rows.prompts[1]) == "<s> very bad :"
    assert max(len(p) + len(c) for p, c in zip(rows.prompts, rows.completions)) == 6
    with pytest.raises(InputError, match="row 1's prompt and target have"):
        encode_completions(source, words(), 3, truncate=True, **options)
    cut = encode_completions(
        source, words([], ["</s>"]), 3, target_column="answer", end=END, start=PAD, truncate=True
    )
    assert spelled(cut.prompts[1]) == "it was </s>"


def test_splits_are_padded_alike(source):
    one = encode_completions(source, words(), target_column="answer", end=END)
    other = encode_completions(
        source, words(), target_column="answer", template="{text} {text} {text}", end=END
    )
    splits = same_lengths({"train": one, "dev": other})
    assert [rows.lengths.tokens for rows in splits.values()] == [16, 16]
    np.testing.assert_array_equal(splits["train"][0]["tokens"][:8], one[0]["tokens"])


def test_what_cannot_be(source):
    with pytest.raises(InputError, match="names no end token"):
        encode_completions(source, words(), target_column="answer")
    with pytest.raises(
        InputError, match=r"^texts\.jsonl: no column 'reply'; the columns are: text, answer, "
    ):
        encode_completions(source, words(), target_column="reply", end=END)
    blank = datasets.Dataset.from_dict({"text": ["good", ""], "answer": ["bad", "bad"]})
    with pytest.raises(InputError, match=r"row 2 has no token of this model's vocabulary in its prompt"):
        encode_completions(
            Source("texts.jsonl", "train", blank, "text", None, ""), words(), target_column="answer", end=END
        )
