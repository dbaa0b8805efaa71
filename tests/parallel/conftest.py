"""What the tests of `parallel` share: two jobs, loaded from the files beside."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest


def load(name: str) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name(name))))


@pytest.fixture(scope="session")
def toy() -> SimpleNamespace:
    """The functions and sizes of `toy.py`."""
    return load("toy.py")


@pytest.fixture(scope="session")
def decoder() -> SimpleNamespace:
    """The functions and sizes of `decoder.py`."""
    return load("decoder.py")
