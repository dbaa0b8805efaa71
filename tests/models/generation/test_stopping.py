"""Where rows end: stop tokens, sequences and strings, minimal lengths; and that streaming tells the same."""

import numpy as np
import pytest

from modicum import InputError
from modicum.models.generation import Sampling, beam_search, generate, stream
from modicum.models.generation.stopping import NOTHING, Stops, first_stop, make_stops

pytestmark = pytest.mark.usefixtures("quick_compile")

PROMPTS = [[5, 9, 2], [44, 3, 17, 20, 8], [61]]
NEW = 24


def text_of(ids):
    """Two letters for each id."""
    return "".join(f"{chr(97 + i // 10)}{i % 10}" for i in ids)


@pytest.fixture(scope="module")
def free(small):
    """The unhindered continuations."""
    rows = generate(*small, PROMPTS, max_new_tokens=NEW).rows()
    assert len({token for row in rows for token in row.tolist()}) > 12
    return [row.tolist() for row in rows]


def first_index(row, tokens):
    return next((i + 1 for i, token in enumerate(row) if token in tokens), len(row))


def test_rows_end_with_their_first_stop_token(small, free):
    stops = [free[0][4], free[1][7]]
    got = generate(*small, PROMPTS, max_new_tokens=NEW, stop_tokens=stops, pad_token=96)
    lengths = [first_index(row, stops) for row in free]
    assert min(lengths) < NEW and got.lengths.tolist() == lengths
    for row, length, tokens, reason in zip(free, lengths, got.tokens, got.reasons):
        assert tokens[:length].tolist() == row[:length]
        assert (tokens[length:] == 96).all()
        assert reason == ("stop_token" if row[length - 1] in stops else "length")
    assert got.tokens.shape[1] == max(lengths)


def test_one_stop_token_may_be_a_number(small, free):
    got = generate(*small, PROMPTS[:1], max_new_tokens=NEW, stop_tokens=free[0][0])
    assert got.tokens.tolist() == [free[0][:1]] and got.reasons == ("stop_token",)


def test_rows_end_with_a_sequence_of_tokens(small, free):
    sequence = free[0][3:6]
    got = generate(*small, PROMPTS, max_new_tokens=NEW, stop_sequences=[sequence, [96] * 5, [95, 94]])
    for row, tokens, length, reason in zip(free, got.tokens, got.lengths, got.reasons):
        ends = [end for end in range(3, NEW + 1) if row[end - 3 : end] == sequence]
        expected = ends[0] if ends else NEW
        assert length == expected and tokens[:length].tolist() == row[:expected]
        assert reason == ("stop_sequence" if ends else "length")
    assert got.lengths[0] == 6


def test_a_sequence_does_not_reach_back_into_the_prompt(small, free):
    sequence = [PROMPTS[0][-1], free[0][0]]
    got = generate(*small, PROMPTS[:1], max_new_tokens=4, stop_sequences=[sequence])
    assert got.lengths.tolist() == [4]


def test_rows_end_where_a_string_stands_in_their_text(small, free):
    """Also where it begins inside one token and ends inside another; several steps are looked at at once."""
    string = text_of(free[0][18:21])[1:5]
    got = generate(*small, PROMPTS, max_new_tokens=NEW, stop_sequences=[string, "zz"], text_of=text_of)
    for row, tokens, length, reason in zip(free, got.tokens, got.lengths, got.reasons):
        ends = [end for end in range(1, NEW + 1) if string in text_of(row[:end])]
        expected = ends[0] if ends else NEW
        assert length == expected and tokens[:length].tolist() == row[:expected]
        assert reason == ("stop_sequence" if ends else "length")
    assert got.lengths[0] <= 21 and got.reasons[0] == "stop_sequence"


def test_stop_tokens_wait_for_the_minimal_length(small, free):
    """They are not chosen before; what then is chosen is the next best token."""
    stop = free[0][2]
    got = generate(*small, PROMPTS, max_new_tokens=NEW, stop_tokens=stop, min_new_tokens=8)
    assert (got.lengths >= 8).all()
    assert all(stop not in row[:8] for row in got.rows())
    sequence = [free[0][1]]
    got = generate(*small, PROMPTS[:1], max_new_tokens=NEW, stop_sequences=[sequence], min_new_tokens=8)
    expected = [i + 1 for i, token in enumerate(free[0]) if i + 1 >= 8 and token == sequence[0]]
    assert got.lengths.tolist() == [expected[0] if expected else NEW]


@pytest.mark.parametrize("kind", ["free", "token", "sequence", "string", "sampled"])
def test_a_stream_yields_what_generate_returns(small, free, kind):
    import jax

    options = {
        "free": {},
        "token": {"stop_tokens": [free[0][4], free[1][7]]},
        "sequence": {"stop_sequences": [free[1][2:4]]},
        "string": {"stop_sequences": [text_of(free[0][9:11])], "text_of": text_of},
        "sampled": {"sampling": Sampling(1.5, top_k=20), "rng": jax.random.key(4)},
    }[kind]
    whole = generate(*small, PROMPTS, max_new_tokens=NEW, pad_token=NOTHING, **options)
    steps = np.stack(list(stream(*small, PROMPTS, max_new_tokens=NEW, **options)), 1)
    np.testing.assert_array_equal(steps, whole.tokens)
    single = list(stream(*small, PROMPTS[0], max_new_tokens=NEW, **options))
    assert single == whole.rows()[0].tolist() and all(isinstance(token, int) for token in single)


def test_a_stream_stops_when_its_reader_does(small, free):
    tokens = stream(*small, PROMPTS[1], max_new_tokens=NEW)
    assert [next(tokens) for _ in range(3)] == free[1][:3]
    tokens.close()


def test_a_stream_refuses_before_its_first_token(small):
    with pytest.raises(InputError, match="max_new_tokens"):
        stream(*small, [1], max_new_tokens=0)


def test_a_tokenizer_without_an_end_token_stops_nothing(small, free):
    whole = generate(*small, PROMPTS, max_new_tokens=NEW, stop_tokens=None)
    assert [row.tolist() for row in whole.rows()] == free
    beam_search(*small, PROMPTS[:1], max_new_tokens=2, beams=2, stop_tokens=None)


def test_stops_find_tokens_and_tails():
    stops = make_stops([7, 8], [[1, 2], [5, 6, 7, 1, 3]], 2, 10)
    assert isinstance(stops, Stops) and stops.span == 6
    recent = np.full((5, 6), NOTHING)
    recent[0, -1], recent[1, -2:], recent[2, -2:], recent[3, -5:] = 7, [1, 2], [2, 1], [5, 6, 7, 1, 3]
    assert np.asarray(stops.found(recent, 2)).tolist() == [1, 2, 0, 2, 0]
    assert np.asarray(stops.found(recent, 1)).tolist() == [0, 0, 0, 0, 0]
    nothing = make_stops((), (), 0, 10)
    assert nothing.span == 1 and np.asarray(nothing.found(recent[:, -1:], 1)).tolist() == [0] * 5


def test_the_first_place_of_a_string_is_found():
    assert first_stop([0, 11, 22, 33], ["b1c"], text_of, 1) == 3
    assert first_stop([0, 11, 22, 33], ["b1c"], text_of, 4) == 4
    assert first_stop([0, 11, 22, 33], ["x"], text_of, 1) is None
    assert first_stop([0, 11], [], text_of, 1) is None
