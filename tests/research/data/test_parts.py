"""Parts of rows: what is spread over all of them, and what is held out."""

from itertools import pairwise

import pytest

from modicum import InputError
from modicum.research.data.parts import every_nth, hold_out, spread_out


def test_rows_are_spread_over_the_whole_of_a_part():
    for length in range(1, 60):
        for count in range(1, 70):
            numbers = list(spread_out(range(length), count).numbers)
            kept = min(count, length)
            steps = {after - before for before, after in pairwise(numbers)}
            assert len(numbers) == kept and numbers[0] == 0
            assert steps <= {length // kept, -(-length // kept)}
            assert length - numbers[-1] <= -(-length // kept)  # nothing is left at the end
            if length % kept == 0:
                assert numbers == list(every_nth(range(length), count).numbers)
    assert list(spread_out(range(199), 100).numbers)[-1] == 197


def test_every_nth_row_has_one_distance():
    assert list(every_nth(range(199), 100).numbers) == list(range(100))
    assert list(every_nth(range(10), 3).numbers) == [0, 3, 6]


def test_no_rows_are_refused():
    for thin in (spread_out, every_nth):
        with pytest.raises(InputError, match="0 rows at equal distances; at least one is valid"):
            thin(range(4), 0)


def test_the_last_rows_are_held_out():
    train, dev = hold_out(range(20), 0.1)
    assert (list(train.numbers), list(dev.numbers)) == (list(range(18)), [18, 19])
    with pytest.raises(InputError, match=r"holding out 1.0 of 20 rows"):
        hold_out(range(20), 1.0)
