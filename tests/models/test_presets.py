"""Every preset as text that is committed, so that a change of a default shows in review."""

import os
from dataclasses import fields, replace
from pathlib import Path

import jax
import pytest

from modicum import InputError
from modicum.models import PRESETS, Transformer, TransformerConfig, preset
from modicum.models.costs import abstract_parameters, parameter_count
from modicum.parallel.rules import axis_names

GOLDEN = Path(__file__).parent / "golden"


def resolved(config: TransformerConfig) -> str:
    lines = [f"{field.name} = {getattr(config, field.name)!r}" for field in fields(config)]
    count = parameter_count(Transformer(replace(config, scan=True)))  # as many, and sooner traced
    return "\n".join([*lines, f"parameters = {count:,}", ""])


# As imported: tests of the command line add a tiny preset of their own while they run.
SHIPPED = frozenset(PRESETS)


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_preset_is_what_it_was(name):
    """`UPDATE_GOLDEN=1 pytest tests/models/test_presets.py` writes the files anew."""
    file, text = GOLDEN / f"{name}.txt", resolved(preset(name))
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(text)
    assert file.read_text() == text


def test_no_golden_file_is_left_of_a_preset_that_is_gone():
    assert {file.stem for file in GOLDEN.glob("*.txt")} == SHIPPED


@pytest.mark.parametrize("name", PRESETS)
def test_the_axis_table_names_every_axis_of_every_preset(name):
    config = preset(name)
    model = Transformer(replace(config, layers=2 * config.period))
    tree = abstract_parameters(model)
    names = axis_names(tree, model.axes)

    def check(leaf, axes):
        assert len(axes) == len(leaf.shape)
        sizes = {"width": model.config.width, "vocab": model.config.padded_vocab}
        for axis, size in zip(axes, leaf.shape):
            assert size == sizes.get(axis, size), (axes, leaf.shape)

    jax.tree.map(check, tree, names)


def test_an_unknown_preset_is_answered_with_near_misses():
    with pytest.raises(InputError, match=r"'gpt2-smal' is unknown; did you mean .*gpt2") as error:
        preset("gpt2-smal")
    assert "\n" not in str(error.value)
