"""config.json is read to its last key."""

import pytest

from modicum import InputError
from modicum.models.pretrained.settings import Settings


def test_what_is_read_or_generic_is_fine():
    settings = Settings({"n_layer": 2, "dropout": 1, "use_cache": True, "pruned_heads": {}, "n_inner": None})
    assert settings.take("n_layer", 12) == 2
    assert settings.take("dropout", 0.1) == 1
    assert settings.take("absent", 7) == 7
    assert settings.take("n_inner", 5) is None
    settings.finish("toy")


def test_everything_wrong_is_listed_at_once():
    settings = Settings({"kind": "odd", "twist": 3, "is_decoder": True, "pruned_heads": {"0": [1]}})
    assert settings.require("kind", "even", "uneven") == "even"
    assert settings.require("absent", "first", "second") == "first"
    with pytest.raises(InputError) as error:
        settings.finish("toy")
    message = str(error.value)
    assert "\n" not in message and "of a toy model" in message
    assert "kind='odd' (valid: 'even', 'uneven')" in message
    assert "twist=3 (unknown key; ignore=('twist',) passes over it)" in message
    assert "is_decoder=True (valid: False)" in message and "pruned_heads={'0': [1]} (valid: {})" in message


def test_keys_that_the_user_or_the_family_passes_over():
    settings = Settings({"twist": 3, "turn": 4}, ignore=["twist"])
    settings.ignore("turn")
    settings.finish("toy")


@pytest.mark.parametrize(
    ("value", "default", "fits"),
    [
        (3, 1, True),
        (3.0, 1, True),
        (3.5, 1, False),
        (True, 1, False),
        (1, True, False),
        ("3", 1, False),
        (3, 1.0, True),
        ("x", "y", True),
        (None, 1, True),
        (3, None, True),
        ([1], "y", False),
    ],
)
def test_values_have_the_type_of_the_default(value, default, fits):
    settings = Settings({"key": value})
    if fits:
        found = settings.take("key", default)
        assert found == value and (not isinstance(default, int) or value is None or isinstance(found, int))
        return
    with pytest.raises(InputError, match=f"a value of type {type(default).__name__} is valid"):
        settings.take("key", default)


def test_a_key_without_a_default_must_be_there():
    with pytest.raises(InputError, match="has no 'model_type'"):
        Settings({}).take("model_type")
