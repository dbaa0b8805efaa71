"""The method that CONTRIBUTING.md adds is real: its code and its row pass what every method passes."""

import importlib.util
import re
import sys
import textwrap
import types
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from modicum import InputError
from modicum.research.delta import METHODS, attach

HERE = Path(__file__).resolve().parent
CONTRIBUTING = HERE.parents[2] / "CONTRIBUTING.md"

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def blocks():
    """The Python of the section about methods."""
    section = CONTRIBUTING.read_text().split("## Adding a delta method")[1].split("\n## ")[0]
    found = re.findall(r"^( *)```python\n(.*?)^\1```", section, re.DOTALL | re.MULTILINE)
    assert len(found) == 2
    return [textwrap.dedent(code) for _, code in found]


@pytest.fixture(scope="module")
def example(blocks):
    """The names that its code defines; it is a module, so that its annotations are read as in one."""
    name = "modicum_contributing_example"
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(blocks[0], str(CONTRIBUTING), "exec"), vars(module))
    yield module
    del sys.modules[name]


@pytest.fixture(scope="module")
def every_method():
    """The tests of all methods, as functions of a case."""
    path = HERE / "test_every_method.py"
    spec = importlib.util.spec_from_file_location("modicum_every_method", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def case(blocks, example, every_method, monkeypatch):
    """Its row, and the method among those that files name."""
    monkeypatch.setitem(METHODS, "added_bias", example.AddedBias)
    return eval(blocks[1], {**vars(every_method), **vars(example)})


def test_it_starts_where_the_model_was(case, every_method):
    for scan in (False, True):
        every_method.test_where_training_starts(case, scan)
    every_method.test_scanned_layers_start_as_unrolled_ones(case)


def test_it_trains_and_is_stored(case, every_method, x64, tmp_path):
    every_method.test_every_variable_trains(case, x64)
    every_method.test_a_stored_delta_comes_back(case, tmp_path)


def test_it_merges_scales_and_keeps_to_its_layers(case, every_method, x64):
    every_method.test_a_layer_range_of_a_scan_is_that_of_the_unrolled_model(case, x64)
    every_method.test_merging(case, x64)
    every_method.test_scaling(case, x64)


def test_a_bfloat16_backbone(case, every_method):
    every_method.test_a_bfloat16_backbone(case)


def test_every_check_of_a_method_is_made_here(every_method):
    text = Path(__file__).read_text()
    checks = {name for name in vars(every_method) if name.startswith("test_")}
    missing = {name for name in checks if f"every_method.{name}(case" not in text}
    assert checks and not missing


def test_its_errors_are_one_line(example):
    model, x = nn.Dense(3, use_bias=False), jnp.ones((2, 4))
    params = model.init(jax.random.key(0), x)["params"]
    tuned = attach(model, {"": example.AddedBias()})
    variables = tuned.init(jax.random.key(1), params, x)
    with pytest.raises(InputError, match=r"there is no bias \[3\]") as caught:
        tuned.merge(params, variables)
    assert "\n" not in str(caught.value)
