"""Configurations as text and back; sweeps as lists of overrides."""

from dataclasses import dataclass, field

import pytest

from modicum import InputError, models
from modicum.research.study import sweeps
from modicum.research.study.configs import flatten, from_text, names_in, to_text


@dataclass(frozen=True)
class Inner:
    rank: int = 4
    names: tuple[str, ...] = ("a",)


@dataclass(frozen=True)
class Outer:
    rate: float = 1
    inner: Inner = field(default_factory=Inner)


NAMED = {"Inner": Inner, "Outer": Outer}


def test_a_configuration_comes_back_equal():
    config = Outer(0.5, Inner(8, ("x", "y")))
    assert from_text(to_text(config), NAMED) == config


@pytest.mark.parametrize("name", models.PRESETS)
def test_every_preset_comes_back_equal(name):
    config = models.preset(name)
    assert from_text(to_text(config), names_in(models)) == config


def test_an_integer_in_a_float_field_is_the_same_text():
    assert to_text(Outer(1)) == to_text(Outer(1.0))


def test_unknown_classes_and_fields_are_errors():
    with pytest.raises(InputError, match="Inner"):
        from_text(to_text(Outer()), {"Outer": Outer})
    with pytest.raises(InputError, match="no field 'depth'"):
        from_text('{"_class": "Inner", "depth": 3}', NAMED)


def test_a_lambda_cannot_be_stored():
    with pytest.raises(InputError, match="config"):
        to_text(Outer(inner=lambda: 1))  # type: ignore[arg-type]


def test_flatten_shows_classes_as_entries():
    flat = flatten({"_class": "Outer", "inner": {"_class": "Inner", "rank": 4}})
    assert flat == {"inner": "Inner", "inner.rank": 4}


def test_combinators():
    a, b = sweeps.grid(rank=[1, 2]), sweeps.grid(rate=[0.1, 0.2])
    assert len(sweeps.product(a, b)) == 4 and sweeps.product(a, b)[1] == {"rank": 1, "rate": 0.2}
    assert sweeps.chain(a, b) == [*a, *b]
    assert sweeps.zip_(a, b) == [{"rank": 1, "rate": 0.1}, {"rank": 2, "rate": 0.2}]
    assert sweeps.prefix("inner", a) == [{"inner.rank": 1}, {"inner.rank": 2}]
    assert len(sweeps.subsample(sweeps.product(a, b), 3)) == 3
    with pytest.raises(InputError, match="equally many"):
        sweeps.zip_(a, sweeps.grid(rate=[0.1]))


def test_overrides_reach_nested_fields_and_unknown_ones_name_near_misses():
    assert sweeps.apply(Outer(), {"inner.rank": 16, "rate": 0.5}) == Outer(0.5, Inner(16))
    with pytest.raises(InputError, match="rank"):
        sweeps.apply(Outer(), {"inner.rnak": 16})
