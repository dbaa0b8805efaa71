"""Worked answers of training costs (research/apps.md 5.1 and 5.2)."""

import pytest

from modicum import InputError
from modicum.parallel.plan import chip
from modicum.research.planning import (
    TrainingCost,
    tokens_per_second,
    training_days,
    training_flops,
    utilisation,
)

A100 = chip("a100-80").peak["bfloat16"]


def test_llama_3_70b_on_a_v5p_pod():
    """15T tokens on 8960 chips at 40%: 44 days."""
    assert training_days(70e9, 15e12, 8960, chip("v5p").peak["bfloat16"], 0.4) == pytest.approx(44, rel=0.01)


def test_deepseek_v3():
    """37e9 active, 14.8T tokens, 2.79M H800-hours at 1.513e15 in float8: 21.7%."""
    rate = 14.8e12 / (2.79e6 * 3600)
    assert utilisation(6 * 37e9, rate, 1, 1.513e15) == pytest.approx(0.217, abs=0.001)


def test_megatron_turing_nlg_exactly():
    """60.1 s a step of 1920 x 2048 on 2240 A100: 29.77%."""
    assert round(100 * utilisation(6 * 530e9, 1920 * 2048 / 60.1, 2240, A100), 2) == 29.77


@pytest.mark.parametrize(
    ("parameters", "tokens", "hours", "percent"),
    [
        (65.2e9, 1.4e12, 1_022_362, 48),
        (32.5e9, 1.4e12, 530_432, 46),
        (176.247e9, 366e9, 1_082_990, 31.8),
    ],
)
def test_whole_runs(parameters, tokens, hours, percent):
    """LLaMA-65B, 33B and BLOOM from their accelerator-hours."""
    found = utilisation(6 * parameters, tokens / (hours * 3600), 1, A100)
    assert 100 * found == pytest.approx(percent, abs=0.5)


def test_gpt3_on_64_a100():
    """365 days and 561 thousand hours at 50%; 935 thousand at 30%."""
    assert training_flops(175e9, 300e9) == pytest.approx(3.15e23)
    assert training_days(175e9, 300e9, 64, A100, 0.5) == pytest.approx(365, abs=1)
    assert training_days(175e9, 300e9, 1, A100, 0.3) * 24 == pytest.approx(935e3, rel=0.001)


def test_a_cost_counts_hours_dollars_and_energy():
    rate = tokens_per_second(6e9, 0.5, 8, 312e12)
    cost = TrainingCost(rate * 86_400, 8, rate, 2.0, 400)
    assert (cost.days, cost.chip_hours, cost.dollars) == pytest.approx((1.0, 192.0, 384.0))
    assert cost.kilowatt_hours == pytest.approx(76.8)
    assert TrainingCost(1, 1, 1).dollars is None


def test_nothing_to_train_is_refused():
    with pytest.raises(InputError, match="tokens=0 must be above 0"):
        TrainingCost(0, 1, 1)
