"""Sampled continuations: same seed, same tokens, whatever stands beside a row in its batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models.generation import Sampling, generate

pytestmark = pytest.mark.usefixtures("quick_compile")

PROMPTS = [[5, 9, 2], [44, 3, 17, 20, 8], [61]]
SAMPLING = Sampling(temperature=1.3, top_k=40, top_p=0.95, min_p=0.001)


def sampled(small, prompts, rng, new=16, **options):
    return generate(
        *small, prompts, max_new_tokens=new, **{"sampling": SAMPLING, **options}, rng=rng
    ).tokens.tolist()


def test_the_same_seed_gives_the_same_tokens_and_another_others(small):
    first = sampled(small, PROMPTS, jax.random.key(0))
    assert sampled(small, PROMPTS, jax.random.key(0)) == first
    assert sampled(small, PROMPTS, jax.random.key(1)) != first


def test_equal_prompts_are_continued_differently_under_one_key(small):
    rows = sampled(small, [[5, 9]] * 3, jax.random.key(0))
    assert len({tuple(row) for row in rows}) == 3


def test_a_row_does_not_depend_on_its_batch(small):
    keys = jax.random.split(jax.random.key(7), 3)
    together = sampled(small, PROMPTS, keys)
    for row in (0, 1, 2):
        assert sampled(small, PROMPTS[row : row + 1], keys[row : row + 1]) == together[row : row + 1]
    assert sampled(small, PROMPTS[::-1], keys[::-1]) == together[::-1]
    with_longer = sampled(small, [*PROMPTS, [1] * 30], jax.random.split(jax.random.key(7), 4))
    assert len(with_longer) == 4


def test_top_k_of_one_is_greedy(small):
    greedy = generate(*small, PROMPTS, max_new_tokens=8).tokens.tolist()
    assert sampled(small, PROMPTS, jax.random.key(0), 8, sampling=Sampling(5.0, top_k=1)) == greedy
    assert sampled(small, PROMPTS, None, 8, sampling=Sampling(0.0, top_k=3, top_p=0.4)) == greedy


def test_a_penalty_sees_prompt_and_new_tokens_of_its_own_row(small):
    """With a huge penalty no token that the row has is chosen again while another has a positive logit."""
    model, params = small
    got = generate(*small, PROMPTS, max_new_tokens=12, sampling=Sampling(0.0, repetition_penalty=1.7))
    forward = jax.jit(model.apply)
    for prompt, row in zip(PROMPTS, got.tokens):
        text = list(prompt)
        for _ in range(12):
            padded = np.zeros((1, 20), np.int32)
            padded[0, : len(text)] = text
            logits = np.array(forward(params, jnp.asarray(padded))[0, len(text) - 1, :97])
            for token in set(text):
                logits[token] = logits[token] * 1.7 if logits[token] < 0 else logits[token] / 1.7
            text.append(int(logits.argmax()))
        assert row.tolist() == text[len(prompt) :]
    assert got.tokens.tolist() != generate(*small, PROMPTS, max_new_tokens=12).tokens.tolist()


@pytest.mark.parametrize(
    "rng, problem",
    [(None, "give rng"), (np.zeros(2, np.uint32), "make a key"), ("keys", "shape")],
)
def test_keys_that_are_none_are_refused(small, rng, problem):
    rng = jax.random.split(jax.random.key(0), 2) if isinstance(rng, str) else rng
    with pytest.raises(InputError, match=problem):
        sampled(small, PROMPTS, rng)
