"""Packing loses no token, predicts each but a document's first once, and never across documents."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum import InputError
from modicum.research.data import packing
from modicum.research.data.packing import Packed, pack, packed_corpus
from modicum.research.data.tokenizers import Tokenizer, train_tokenizer

EOS = 1
lengths = st.lists(st.integers(0, 23), min_size=1, max_size=12).filter(any)


def numbered(sizes: list[int]) -> list[np.ndarray]:
    """Documents whose tokens say which document and which place they are."""
    return [1000 * (number + 1) + np.arange(size) for number, size in enumerate(sizes)]


def pairs(packed: Packed) -> list[tuple[int, int, float, int]]:
    """Every (token, target, weight, position) outside padding, row by row."""
    found = []
    for index in range(len(packed)):
        row = packed[index]
        inside = row["segments"] > 0
        fields = (row[name][inside].tolist() for name in ("tokens", "targets", "weights", "positions"))
        found += list(zip(*fields))
    return found


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 9))
def test_every_pair_of_neighbours_once_and_in_order(sizes: list[int], length: int) -> None:
    documents = numbered(sizes)
    packed = pack(documents, length, EOS)
    expected = [pair for ids in documents for pair in zip(ids.tolist(), [*ids[1:].tolist(), EOS]) if len(ids)]
    found = pairs(packed)
    assert [pair[:2] for pair in found] == expected
    assert all(weight == 1 for _, _, weight, _ in found)
    assert len(packed) == -(-len(expected) // length)  # all rows but the last are full


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 9))
def test_rows_are_well_formed(sizes: list[int], length: int) -> None:
    packed = pack(numbered(sizes), length, EOS)
    for index in range(len(packed)):
        row = packed[index]
        dtypes = {name: (field.shape, field.dtype) for name, field in row.items()}
        ints = dict.fromkeys(("tokens", "targets", "segments", "positions"), ((length,), np.dtype(np.int32)))
        assert dtypes == {**ints, "weights": ((length,), np.dtype(np.float32))}
        segments = row["segments"]
        used = int((segments > 0).sum())
        assert (segments[used:] == 0).all() and (row["weights"][used:] == 0).all()
        assert segments[0] == 1 and set(np.diff(segments[:used])) <= {0, 1}
        starts = np.flatnonzero(np.diff(segments[:used], prepend=0))
        for begin, end in zip(starts, [*starts[1:], used]):
            assert (row["positions"][begin:end] == np.arange(end - begin)).all()
            assert len({token // 1000 for token in row["tokens"][begin:end].tolist()}) == 1


def test_a_small_case_by_hand() -> None:
    packed = pack([[10, 11, 12], [], [20, 21]], 4, EOS, pad=0)
    assert len(packed) == 2
    first, second = packed[0], packed[1]
    assert first["tokens"].tolist() == [10, 11, 12, 20]
    assert first["targets"].tolist() == [11, 12, 1, 21]
    assert first["segments"].tolist() == [1, 1, 1, 2]
    assert first["positions"].tolist() == [0, 1, 2, 0]
    assert second["tokens"].tolist() == [21, 0, 0, 0]
    assert second["targets"].tolist() == [1, 0, 0, 0]
    assert second["weights"].tolist() == [1, 0, 0, 0]


def test_only_completions_are_learned() -> None:
    packed = pack([[10, 11, 12, 13], [20, 21]], 8, EOS, prompts=[2, 0], cut=False)
    row = packed[0]
    assert row["targets"].tolist() == [11, 12, 13, 1, 21, 1, 0, 0]
    assert row["weights"].tolist() == [0, 1, 1, 1, 1, 1, 0, 0]
    cut = pack([[10, 11, 12, 13]], 2, EOS, prompts=[2])
    assert [cut[index]["weights"].tolist() for index in range(2)] == [[0, 1], [1, 1]]


def test_prompts_follow_their_documents_past_empty_ones() -> None:
    packed = pack([[], [10, 11], [20, 21]], 4, EOS, prompts=[0, 2, 0])
    assert packed[0]["weights"].tolist() == [0, 1, 1, 1]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.integers(6, 9))
def test_uncut_documents_stay_in_one_row(sizes: list[int], length: int) -> None:
    packed = pack(numbered(sizes), length, EOS, cut=False)
    assert len(packed.pieces) == len(sizes)
    assert packed.pieces[:, 2].tolist() == sizes
    assert all((packed[index]["segments"] > 0).sum() <= length for index in range(len(packed)))
    assert len(pairs(packed)) == sum(sizes)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="document 2 has 5 tokens, a row 4"):
        pack([[10], [20, 21, 22, 23, 24]], 4, EOS, cut=False)
    with pytest.raises(InputError, match="nothing to pack"):
        pack([[], []], 4, EOS)
    with pytest.raises(InputError, match="length is 0"):
        pack([[1]], 0, EOS)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["some words to learn merges from, some words"] * 9, 270)


def corpus(tokenizer: Tokenizer, folder: Path, **options: Any) -> Packed:
    documents = options.pop("documents", ("some words", "to learn"))
    return packed_corpus(documents, tokenizer, 6, folder, options.pop("fingerprint", "f"), **options)


def test_a_corpus_is_packed_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = corpus(tokenizer, tmp_path)
    again = corpus(tokenizer, tmp_path, documents=iter(()))  # not touched
    assert isinstance(again.tokens, np.memmap)
    assert len(first) == len(again) > 1
    for index in range(len(first)):
        for name, field in first[index].items():
            np.testing.assert_array_equal(field, again[index][name])
    assert len(list(tmp_path.iterdir())) == 1
    corpus(tokenizer, tmp_path, fingerprint="other")
    corpus(tokenizer, tmp_path, documents=["a"], cut=False)
    corpus(train_tokenizer(["x y"], 260), tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_corpus_equals_its_texts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    packed = corpus(tokenizer, tmp_path, documents=[("some", " words"), "to learn"])
    text = tokenizer.decode(packed.tokens)
    assert text == "some wordsto learn"
    assert (packed.tokens == tokenizer.eos).sum() == 2
    assert packed.prompts.tolist() == [len(tokenizer.encode(["some"])[0]), 0]


def test_a_kill_while_writing_leaves_nothing(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(packed: Packed, folder: Path) -> None:
        (folder / "tokens.npy").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(packing, "_write", killed)
        corpus(tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".packed-0123-left").mkdir()  # what SIGKILL leaves is never read
    assert len(corpus(tokenizer, tmp_path)) > 1


def test_the_first_of_two_writers_wins(tmp_path: Path) -> None:
    def write(text: str) -> Any:
        def inner(folder: Path) -> None:
            (folder / "file").write_text(text)
            if text == "late":
                packing.write_atomically(tmp_path / "target", write("early"))

        return inner

    packing.write_atomically(tmp_path / "target", write("late"))
    assert (tmp_path / "target" / "file").read_text() == "early"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
