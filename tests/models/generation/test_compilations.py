"""Programs are compiled per bucket and choice of processors, and nothing else."""

import jax
import numpy as np
import pytest

from modicum.models.generation import Sampling, beam_search, generate, stream
from modicum.models.generation.beams import search
from modicum.models.generation.steps import decode, prefill

pytestmark = pytest.mark.usefixtures("quick_compile")


def programs():
    return prefill._cache_size(), decode._cache_size()


def added(before):
    return tuple(now - then for now, then in zip(programs(), before))


def row(length):
    return (np.arange(length) % 90).tolist()


@pytest.fixture(autouse=True)
def forgotten():
    """Each test counts from nothing."""
    for function in (prefill, decode, search):
        function.clear_cache()


def test_many_lengths_share_two_programs(small):
    """Prompts of 1 to 16 tokens and 1 to 16 new ones: one bucket, one prefill and one decode program."""
    for length, new in [(1, 16), (16, 8), (7, 1), (9, 15), (13, 3), (2, 2)]:
        generate(*small, [row(length)], max_new_tokens=new)
    assert programs() == (1, 1)
    list(stream(*small, row(5), max_new_tokens=9))
    assert programs() == (1, 1), "streaming is the same program"


def test_lengths_up_to_200_need_few_programs(small):
    for length in range(1, 201, 13):
        generate(*small, [row(length)], max_new_tokens=3)
    assert programs() == (
        8,
        8,
    )  # prompts in 16, 24, 32, 48, 64, 96, 128, 192 and 256 columns; 9 none in 128..
    # sizes that were met: one program each, whatever the length within them


def test_numbers_are_not_part_of_a_program(small):
    key = jax.random.key(0)
    for temperature, k, p in [(0.5, 3, 0.5), (1.0, 50, 0.9), (2.0, 7, 0.1)]:
        generate(*small, [row(5)], max_new_tokens=4, sampling=Sampling(temperature, k, p), rng=key)
    assert programs() == (1, 1)
    generate(*small, [row(5)], max_new_tokens=4, sampling=Sampling(0.5, 3), rng=key)
    assert programs() == (2, 2), "another choice of processors is another program"


def test_stopping_rules_are_not_part_of_a_program(small):
    for tokens, minimum in [((1,), 0), ((1, 2, 3), 2), ((4, 5), 1)]:
        generate(*small, [row(5)], max_new_tokens=4, stop_tokens=tokens, min_new_tokens=minimum)
    assert programs() == (1, 1)
    for sequences in [[[1, 2]], [[1, 2, 3], [4]], [[5, 6, 7, 8]]]:
        generate(*small, [row(5)], max_new_tokens=4, stop_sequences=sequences)
    assert programs() == (2, 2)


def test_strings_cost_no_program(small):
    """They are looked for on the host, every few steps; streaming looks at each."""
    options = {"max_new_tokens": 40, "text_of": lambda ids: "".join(map(chr, ids))}
    text = options["text_of"](generate(*small, [row(5)], max_new_tokens=40).tokens[0])
    before = programs()
    for string in (text[3:5], text[20:22], "no"):
        generate(*small, [row(5)], stop_sequences=[string], **options)
        list(stream(*small, row(5), stop_sequences=[string], **options))
    assert added(before) == (0, 0)


def test_beam_search_is_one_program_per_bucket(small):
    for length, new, penalty in [(3, 5, 1.0), (9, 7, 0.0), (14, 2, -1.0)]:
        beam_search(*small, [row(length)], max_new_tokens=new, beams=3, length_penalty=penalty)
    assert search._cache_size() == 1


def test_the_cache_is_changed_in_place(small):
    """The donated state has the size of the cache; the compiled step makes no second one."""
    from modicum.models.generation.job import Job

    job = Job(*small, [row(5)], 100)
    compiled = decode.lower(
        job.model, job.params, job.state, job.stops, job.numbers, np.int32(4), job.ended, layout=None
    ).compile()
    memory = compiled.memory_analysis()
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(job.state) if hasattr(leaf, "nbytes"))
    assert memory.alias_size_in_bytes >= 0.99 * state
    before = job.state.memory.cache
    leaf = jax.tree.leaves(before.entries)[0]
    job.advance(3)
    assert leaf.is_deleted()
