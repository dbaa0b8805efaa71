"""What the tests of `parallel` share: the toy job, loaded from the file beside."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def toy() -> SimpleNamespace:
    """The functions and sizes of `toy.py`."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("toy.py"))))
