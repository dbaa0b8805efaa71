"""The oracle, for tests that compare with `transformers`, and a checkpoint for those that need none."""

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from modicum.models import MLP, GroupedQuery, Learned, Transformer, TransformerConfig
from modicum.models.pretrained import save_pretrained


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """The module `oracle.py` beside this file; the test is skipped where torch or transformers is absent."""
    spec = importlib.util.spec_from_file_location("modicum_oracle", Path(__file__).with_name("oracle.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory, random_parameters):
    """(folder, model, params) of a small GPT-2 with random parameters, written by `save_pretrained`."""
    config = TransformerConfig(
        layers=2,
        width=16,
        vocab=50,
        attention=GroupedQuery(2),
        mlp=MLP(24, "gelu_tanh"),
        positions=Learned(20),
    )
    model = Transformer(config)
    params = random_parameters(model, np.zeros((1, 2), np.int32))
    folder = tmp_path_factory.mktemp("tiny") / "gpt2"
    return save_pretrained(folder, model, params, architecture="GPT2LMHeadModel"), model, params


@pytest.fixture
def copy_of(tmp_path):
    """`(folder) -> folder`: a copy that the test may spoil."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))
