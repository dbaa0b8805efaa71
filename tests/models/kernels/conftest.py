"""Random masks for the kernels' tests."""

from collections.abc import Callable
from typing import Any

import pytest

from modicum.models.kernels.masks import Sizes

from .drawing import masks


@pytest.fixture(scope="session")
def random_masks() -> Callable[[int, int, int, int], Any]:
    """Expressions of up to about five masks for sizes B, H, T, S."""
    return lambda *sizes: masks(Sizes(*sizes))
