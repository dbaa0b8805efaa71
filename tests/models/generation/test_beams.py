"""Beam search against its definition: dictionaries of hypotheses in plain Python, one prompt at a time."""

import jax
import numpy as np
import pytest

from modicum import InputError
from modicum.models.generation import beam_search, generate

pytestmark = pytest.mark.usefixtures("quick_compile")

PROMPTS = [[5, 9, 2], [44, 3, 17, 20, 8], [61]]


class Scorer:
    """Log-probabilities of the next token after any text, read anew each time."""

    def __init__(self, model, params):
        self.forward, self.params = jax.jit(model.apply), params

    def __call__(self, texts):
        padded = np.zeros((4, 24), np.int32)
        for row, text in enumerate(texts):
            padded[row, : len(text)] = text
        logits = np.asarray(self.forward(self.params, padded), np.float64)
        last = np.stack([logits[row, len(text) - 1, :97] for row, text in enumerate(texts)])
        return (
            last
            - np.log(np.exp(last - last.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - last.max(-1, keepdims=True)
        )


def reference(score, prompt, beams, new, stop, penalty, early):
    """Hypotheses (score, tokens), best first, by the rules of transformers' beam search."""
    running, complete, hopeful = [(0.0, [])], [], True
    for count in range(1, new + 1):
        logs = score([prompt + tokens for _, tokens in running])
        candidates = sorted(
            (
                (total + logs[i, t], [*tokens, t])
                for i, (total, tokens) in enumerate(running)
                for t in range(97)
            ),
            key=lambda pair: -pair[0],
        )[: max(2, 1 + len(stop)) * beams]
        ended = [count == new or tokens[-1] in stop for _, tokens in candidates]
        full = early is True and len(complete) == beams
        if hopeful and not full:
            fresh = [(t / count**penalty, c) for (t, c), end in list(zip(candidates, ended))[:beams] if end]
            complete = sorted(complete + fresh, key=lambda pair: -pair[0])[:beams]
        running = [pair for pair, end in zip(candidates, ended) if not end][:beams]
        if not running or (early is True and len(complete) == beams):
            break
        length = new if early == "never" and penalty > 0 else count
        worst = complete[-1][0] if len(complete) == beams else -1e9
        hopeful = hopeful and running[0][0] / length**penalty > worst
        if not hopeful:
            break
    return complete


@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.5, -1.0])
def test_the_search_follows_its_definition(small, early, penalty):
    stop = [7, 30, 55, 81, 16, 90, 2, 12]
    got = beam_search(
        *small,
        PROMPTS,
        max_new_tokens=7,
        beams=4,
        returned=4,
        length_penalty=penalty,
        early_stopping=early,
        stop_tokens=stop,
    )
    score = Scorer(*small)
    for row, prompt in enumerate(PROMPTS):
        expected = reference(score, prompt, 4, 7, stop, penalty, early)
        assert len(expected) == 4
        for hypothesis, (total, tokens) in enumerate(expected):
            length = got.lengths[row, hypothesis]
            assert got.tokens[row, hypothesis, :length].tolist() == tokens
            np.testing.assert_allclose(got.scores[row, hypothesis], total, rtol=1e-4)
    assert (np.diff(got.scores, axis=1) <= 0).all()


def test_one_beam_is_greedy(small):
    greedy = generate(*small, PROMPTS, max_new_tokens=10)
    got = beam_search(*small, PROMPTS, max_new_tokens=10, beams=1)
    np.testing.assert_array_equal(got.tokens[:, 0], greedy.tokens)


def test_more_beams_find_more_probable_texts(small):
    scores = [
        beam_search(*small, PROMPTS, max_new_tokens=6, beams=beams, length_penalty=0.0).scores[:, 0]
        for beams in (1, 16)
    ]
    assert (scores[1] >= scores[0] - 1e-5).all() and (scores[1] > scores[0] + 1e-3).any()


def test_minimal_lengths_and_penalties_hold_in_beams(small):
    options = {"max_new_tokens": 9, "beams": 3, "returned": 3, "length_penalty": 0.0, "early_stopping": True}
    free = beam_search(*small, PROMPTS, **options)
    stop = int(free.tokens[0, 0, 1])
    short = beam_search(*small, PROMPTS, stop_tokens=stop, **options)
    assert short.lengths.min() < 6
    longer = beam_search(*small, PROMPTS, stop_tokens=stop, min_new_tokens=6, **options)
    assert longer.lengths.min() >= 6 and all(stop not in row[:5] for row in longer.tokens.reshape(-1, 9))
    varied = beam_search(*small, PROMPTS, repetition_penalty=3.0, **options)
    assert repeats(varied.tokens) < repeats(free.tokens)


def repeats(tokens):
    return sum(len(row) - len(set(row.tolist())) for row in tokens.reshape(-1, tokens.shape[-1]))


def test_a_sequence_of_ids_ends_a_hypothesis(small):
    free = beam_search(*small, PROMPTS[:1], max_new_tokens=8, beams=2)
    sequence = free.tokens[0, 0, 2:4].tolist()
    got = beam_search(*small, PROMPTS[:1], max_new_tokens=8, beams=2, returned=2, stop_sequences=[sequence])
    ended = [row[:n].tolist() for row, n in zip(got.tokens[0], got.lengths[0]) if n < 8]
    assert ended and all(row[-2:] == sequence for row in ended)


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"beams": 0}, "beams=0"),
        ({"beams": 2, "returned": 3}, "returned=3"),
        ({"beams": 2, "early_stopping": "maybe"}, "maybe"),
        ({"beams": 2, "stop_sequences": ["a"]}, "ids only"),
    ],
)
def test_impossible_searches_are_refused(small, options, problem):
    with pytest.raises(InputError, match=problem):
        beam_search(*small, PROMPTS, max_new_tokens=3, **options)
