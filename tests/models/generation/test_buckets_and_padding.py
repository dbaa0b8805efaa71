import numpy as np
import pytest

from modicum import InputError
from modicum.models.generation.buckets import bucket
from modicum.models.generation.padding import as_rows, check_segments, fill_rows, is_single, moved


def test_a_bucket_holds_its_length_and_wastes_at_most_a_third():
    sizes = {bucket(length, 16) for length in range(1, 2049)}
    assert sorted(sizes) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    for length in range(16, 2049):
        assert length <= bucket(length, 16) <= 1.5 * length
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 7)] == [1, 2, 3, 4, 6, 8]


@pytest.mark.parametrize("length, smallest", [(0, 16), (-1, 16), (4, 0)])
def test_buckets_refuse_nothing_and_less(length, smallest):
    with pytest.raises(InputError, match="at least 1"):
        bucket(length, smallest)


def test_ragged_rows_become_an_array_with_segments():
    tokens, segments = as_rows([[5, 6], [7], np.asarray([1, 2, 3])])
    np.testing.assert_array_equal(tokens, [[5, 6, 0], [7, 0, 0], [1, 2, 3]])
    np.testing.assert_array_equal(segments, [[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    np.testing.assert_array_equal(as_rows([5, 6])[0], [[5, 6]])
    np.testing.assert_array_equal(as_rows(np.asarray([5, 6]))[0], [[5, 6]])


def test_one_row_is_told_from_a_batch_of_one():
    assert is_single([5, 6]) and is_single(np.asarray([5, 6]))
    assert not is_single([[5, 6]]) and not is_single(np.asarray([[5, 6]]))


@pytest.mark.parametrize("tokens", [[], [[]], [[1], []], np.zeros((2, 0), int), np.zeros((1, 1, 1), int)])
def test_empty_prompts_are_refused(tokens):
    with pytest.raises(InputError, match="at least one token"):
        as_rows(tokens)


def test_tokens_that_are_no_numbers_are_refused():
    with pytest.raises(InputError, match="float64"):
        as_rows(np.ones((1, 2)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_to_one_side_and_nothing_else_changes(side):
    segments = np.asarray([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]])
    tokens = np.arange(1, 13).reshape(3, 4)
    extra = {"a": np.stack([tokens, -tokens], -1)}
    got = moved({"tokens": tokens, **extra}, segments, 6, side)
    assert got["a"].shape == (3, 6, 2)
    for row in range(3):
        own = tokens[row][segments[row] > 0]
        there = got["tokens"][row][-len(own) :] if side == "left" else got["tokens"][row][: len(own)]
        np.testing.assert_array_equal(there, own)
        assert (got["tokens"][row] != 0).sum() == len(own)
    np.testing.assert_array_equal(got["a"][..., 0], got["tokens"])
    np.testing.assert_array_equal(got["a"][..., 1], -got["tokens"])


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="3 tokens do not fit"):
        moved(np.ones((1, 3)), np.ones((1, 3)), 2, "left")
    with pytest.raises(InputError, match=r"must be \(1, 3\)"):
        moved(np.ones((1, 4)), np.ones((1, 3)), 4, "left")


@pytest.mark.parametrize(
    "segments, problem",
    [([[1, 1]], "shape"), ([[0, 0, 0]], "all padding"), ([[1, 0, 1]], "between real tokens")],
)
def test_segments_that_are_no_padding_are_refused(segments, problem):
    with pytest.raises(InputError, match=problem):
        check_segments(np.ones((1, 3), int), segments)


def test_rows_are_filled_with_the_last():
    np.testing.assert_array_equal(fill_rows(np.asarray([[1], [2]]), 4), [[1], [2], [2], [2]])
