"""The oracle, for tests that compare with `transformers`."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """The module `oracle.py` beside this file; the test is skipped where torch or transformers is absent."""
    spec = importlib.util.spec_from_file_location("modicum_oracle", Path(__file__).with_name("oracle.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
