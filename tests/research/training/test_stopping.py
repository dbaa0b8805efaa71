"""Reasons to stop: signals, numbers that are not finite, patience."""

import os
import signal
import threading
import time

import pytest

from modicum import InputError
from modicum.research.training.config import TrainingConfig
from modicum.research.training.stopping import (
    NonFiniteLoss,
    interruption,
    out_of_patience,
    require_finite,
)

NAN, INFINITE = float("nan"), float("inf")


def impatient(values, patience, metric="loss"):
    config = TrainingConfig(patience=patience, evaluate_every=1, best_metric=metric)
    return out_of_patience([{"step": i, config.best_name: value} for i, value in enumerate(values)], config)


@pytest.mark.parametrize(
    "values, patience, over",
    [
        ([3, 2, 1], 1, False),
        ([3, 2, 2], 1, True),  # as good is not better
        ([3, 2, 2.5], 2, False),
        ([3, 2, 2.5, 2.1], 2, True),
        ([3, 2, 2.5, 1.9], 2, False),
        ([1, 2, 3, 0.5, 2], 2, False),
        ([1], 1, False),
        ([2, 3], 0, False),
        ([], 1, False),
        ([3, NAN, NAN], 2, True),
        ([NAN, 3], 1, False),
        ([NAN, NAN], 1, True),
    ],
)
def test_patience_counts_evaluations_since_the_best(values, patience, over):
    assert impatient(values, patience) == over


def test_larger_is_better_where_the_metric_says_so():
    assert not impatient([0.5, 0.6], 1, "+accuracy")
    assert impatient([0.6, 0.5], 1, "+accuracy")


def metrics(loss=1.0, finite=True, **more):
    return {"loss": loss, "finite": finite, **more}


def test_a_step_that_is_not_finite_is_named_with_what_was_not():
    require_finite(3, metrics(), skips=False)
    with pytest.raises(NonFiniteLoss, match=r"step 7: the loss is not finite \(loss nan\)") as error:
        require_finite(7, metrics(NAN, False), skips=False)
    assert "\n" not in str(error.value) and isinstance(error.value, InputError)
    with pytest.raises(NonFiniteLoss, match=r"step 8: the gradient is not finite \(loss 1\.5\)"):
        require_finite(8, metrics(1.5, False), skips=False)


def test_loss_scaling_may_skip_a_step_as_long_as_it_can_go_lower():
    require_finite(7, metrics(INFINITE, False, loss_scale=2.0), skips=True)
    with pytest.raises(NonFiniteLoss, match="step 7"):
        require_finite(7, metrics(INFINITE, False, loss_scale=1.0), skips=True)


def test_a_signal_that_a_parent_forwards_too_is_one(monkeypatch):
    taken = []
    before = signal.signal(signal.SIGINT, lambda *_: taken.append("usual"))
    monkeypatch.setenv("MODICUM_SUPERVISED", "1")
    monkeypatch.setattr("modicum.research.training.stopping.TOGETHER", 0.2)
    try:
        with interruption() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signal == "SIGINT" and not taken
            time.sleep(0.25)
            os.kill(os.getpid(), signal.SIGINT)
            assert taken == ["usual"]
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_flag_and_the_second_acts_as_usual(number):
    class Usual(Exception):
        pass

    def usual(number, frame):
        raise Usual

    before = signal.signal(number, usual)
    try:
        with interruption() as stop:
            assert stop.agreed(at=False) is None
            os.kill(os.getpid(), number)
            assert stop.agreed(at=False) == signal.Signals(number).name
            with pytest.raises(Usual):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is usual
    finally:
        signal.signal(number, before)


def test_outside_the_main_thread_there_is_no_flag_to_set():
    seen = []

    def work():
        with interruption() as stop:
            seen.append(stop.agreed(at=True))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]
