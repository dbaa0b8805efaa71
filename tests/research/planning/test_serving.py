"""Worked answers of scaling-book (research/apps.md 5.1) and the talk's serving figures."""

from dataclasses import replace

import pytest

from modicum import InputError
from modicum.models.attention import GroupedQuery
from modicum.models.presets import preset
from modicum.parallel.plan import chip
from modicum.research.planning import Serving, cache_bytes_per_token, electricity_dollars

V5E = chip("v5e")


def test_30b_in_int8_on_16_v5e():
    """B=4, 8192 tokens of 100 kB: 2.5 ms."""
    served = Serving(30e9, 1, 100e3, V5E, 16, "int8")
    assert served.step_seconds(4, 8192) == pytest.approx(2.5e-3, rel=0.02)


@pytest.mark.parametrize(("batch", "milliseconds"), [(1, 4.98), (240, 249)])
def test_llama_2_13b_on_8_v5e(batch, milliseconds):
    served = Serving(13e9, 2, 2 * 40 * 40 * 128 * 2, V5E, 8)
    assert served.step_seconds(batch, 8192) == pytest.approx(milliseconds / 1e3, rel=0.01)


def test_llama_3_70b_in_int8_on_8_v5e():
    """B=32, 8192 tokens: 17 ms and 235 tokens/s a chip."""
    served = Serving(70e9, 1, 2 * 80 * 8 * 128, V5E, 8, "int8")
    assert served.step_seconds(32, 8192) == pytest.approx(17e-3, rel=0.02)
    assert served.tokens_per_second(32, 8192) / 8 == pytest.approx(235, rel=0.02)


def test_critical_batches():
    """240 on v5e and 153 on A100-80GB in 16 bits."""
    assert Serving(1e9, 2, 0, V5E).critical_batch == pytest.approx(240, rel=0.01)
    assert Serving(1e9, 2, 0, chip("a100-80")).critical_batch == pytest.approx(153, rel=0.01)


def test_the_bound_bends_at_the_critical_batch():
    served = Serving(10e9, 2, 0, V5E)
    below, above = int(served.critical_batch) - 1, int(served.critical_batch) + 1
    assert served.step_seconds(1, 0) == served.step_seconds(below, 0) < served.step_seconds(above, 0)


def test_gpt3_on_8_a100():
    """21.5 ms a token, 46.6 tokens/s for one stream; 48 rows of 1000 tokens fill 576 GB and take 35 ms."""
    served = Serving(175e9, 2, cache_bytes_per_token(preset("gpt3-175b"), 2), chip("a100-80"), 8)
    assert served.tokens_per_second(1, 0) == pytest.approx(46.6, rel=0.01)
    assert served.memory(48, 1000) == pytest.approx(576e9, rel=0.01)
    assert served.tokens_per_second(48, 1000) == pytest.approx(1358, rel=0.01)
    assert served.largest_batch(1000) == 70


def test_caches_of_multi_grouped_and_single_query():
    config = preset("gpt2")
    sizes = [
        cache_bytes_per_token(replace(config, attention=GroupedQuery(12, groups)), 2) for groups in (12, 4, 1)
    ]
    assert sizes == [2 * 12 * groups * 64 * 2 for groups in (12, 4, 1)]


def test_dollars_and_joules():
    served = Serving(175e9, 2, 0, chip("a100-80"), 8)
    rate = served.tokens_per_second(1, 0)
    assert served.dollars_per_million(1, 0, 3.0) == pytest.approx(24 / (rate * 3600) * 1e6)
    assert served.joules_per_token(1, 0, 400) == pytest.approx(3200 / rate)
    assert electricity_dollars(48, 6.5, 24, 0.1, 1.1) == pytest.approx(48 * 6.5 * 24 * 0.11)


def test_prefill_multiplies():
    served = Serving(70e9, 2, 0, chip("h100"), 8)
    assert served.prefill_seconds(1, 8192) == pytest.approx(2 * 70e9 * 8192 / (8 * 989e12))
    assert served.prefill_seconds(1, 1) == pytest.approx(140e9 / (8 * 3350e9))


@pytest.mark.parametrize("wrong", [{"chips": 0}, {"efficiency": 0.0}, {"efficiency": 1.5}])
def test_nonsense_is_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Serving(1e9, 2, 0, V5E, **wrong)
