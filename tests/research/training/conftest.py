"""What the tests of training share: a small job in plain JAX, loaded from the file beside."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The functions and sizes of `tiny_job.py`."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_job.py"))))
