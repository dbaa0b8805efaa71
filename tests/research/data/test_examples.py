"""Texts and labels become padded rows; labels and lengths that cannot be are named."""

from typing import Any

import datasets
import numpy as np
import pytest

from modicum import InputError
from modicum.research.data.batches import Batches, evaluation_batches
from modicum.research.data.examples import Labels, examples
from modicum.research.data.sources import Source
from modicum.research.data.tokenizers import Tokenizer, train_tokenizer


def source(texts: list[str], labels: list[Any], features: datasets.Features | None = None) -> Source:
    rows = datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)
    return Source("reviews.jsonl", "train", rows, "text", "label", "0" * 16)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["aa bb"], 258)  # bytes only


def test_rows(tokenizer: Tokenizer) -> None:
    data = source(["abc", ""], ["good", "bad"])
    labels = Labels.of(data)
    rows = examples(data, tokenizer, labels, 6)
    assert labels.names == ("bad", "good") and len(labels) == 2 and len(rows) == 2
    row = rows[0]
    assert tokenizer.decode(row["tokens"]) == "abc"
    assert row["tokens"][3] == tokenizer.eos and (row["tokens"][4:] == tokenizer.pad).all()
    assert row["segments"].tolist() == [1, 1, 1, 1, 0, 0]
    assert row["positions"].tolist() == [0, 1, 2, 3, 0, 0]
    assert (row["label"], row["weight"]) == (1, 1.0)
    assert rows[1]["segments"].tolist() == [1, 0, 0, 0, 0, 0]  # an empty text is its end token
    batch = Batches(rows, 2)[0]
    assert batch["tokens"].shape == (2, 6) and batch["label"].shape == (2,)
    assert {name: field.dtype.name for name, field in batch.items()} == {
        **dict.fromkeys(("tokens", "segments", "positions", "label"), "int32"),
        "weight": "float32",
    }
    assert next(evaluation_batches(rows, 3))["weight"].tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("values", "names"),
    [([10, 2, 2], (2, 10)), ([True, False, True], (False, True)), (["b", "a", "b"], ("a", "b"))],
)
def test_labels_in_their_natural_order(values: list[Any], names: tuple[Any, ...]) -> None:
    assert Labels.of(source(["x"] * 3, values)).names == names


def test_a_label_feature_keeps_its_numbers_even_unseen_ones() -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "maybe", "yes"])}
    )
    labels = Labels.of(source(["x", "y"], [2, 0], features))
    assert labels.ids([0, 2], "here").tolist() == [0, 2] and len(labels) == 3


def test_bad_labels(tokenizer: Tokenizer) -> None:
    labels = Labels.of(source(["x", "y"], ["good", "bad"]))
    data = source(["x", "y", "z"], ["good", "bad", "awful"])
    with pytest.raises(InputError) as caught:
        examples(data, tokenizer, labels, 8)
    said = "reviews.jsonl: row 3: the train split lacks label 'awful'; it has: 'bad', 'good'"
    assert str(caught.value) == said
    with pytest.raises(InputError, match="only one label"):
        Labels.of(source(["x", "y"], ["good", "good"]))


def test_long_texts_are_an_error_unless_cut(tokenizer: Tokenizer) -> None:
    data = source(["abc", "abcdefgh"], ["good", "bad"])
    labels = Labels.of(data)
    with pytest.raises(InputError, match=r"reviews\.jsonl: row 2 has 9 tokens, the longest allowed 6"):
        examples(data, tokenizer, labels, 6)
    rows = examples(data, tokenizer, labels, 6, truncate=True)
    assert tokenizer.decode(rows[1]["tokens"]) == "abcde" and rows[1]["tokens"][-1] == tokenizer.eos
    np.testing.assert_array_equal(rows[0]["tokens"], examples(data, tokenizer, labels, 9)[0]["tokens"][:6])
