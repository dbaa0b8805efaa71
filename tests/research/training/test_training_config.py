"""What a run may be asked for."""

import subprocess
import sys

import pytest

from modicum import InputError
from modicum.research.training.config import TrainingConfig


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"batch": 0}, "batch=0 must be at least 1"),
        ({"accumulate": 0}, "accumulate=0 must be at least 1"),
        ({"log_every": 0}, "log_every=0 must be at least 1"),
        ({"keep": 0}, "keep=0 must be at least 1"),
        ({"batch": 6, "accumulate": 4}, "batch=6 does not divide into accumulate=4 parts"),
        ({"patience": 2}, "patience=2 needs evaluate_every of at least 1"),
        ({"ema": 1.0}, "ema=1.0 must be at least 0 and below 1"),
    ],
)
def test_an_impossible_value_is_an_error_of_one_line(change, message):
    with pytest.raises(InputError, match=message) as error:
        TrainingConfig(**change)
    assert "\n" not in str(error.value)


def test_the_sign_of_the_metric_says_which_way_is_better():
    loss, accuracy = TrainingConfig(), TrainingConfig(best_metric="+accuracy")
    assert (loss.best_name, loss.best_mode) == ("loss", "min")
    assert (accuracy.best_name, accuracy.best_mode) == ("accuracy", "max")


def test_a_configuration_is_read_without_jax():
    code = "import sys, modicum.research.training.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
