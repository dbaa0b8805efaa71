"""BitFit: only the biases are tuned (Ben Zaken et al., 2022, arXiv 2106.10199)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .offsets import Offset


@dataclass(frozen=True)
class BitFit(Offset):
    """`bias + offset` for every `bias` that the model has below the address; the offset starts at zero.

    Where the backbone has no biases there is nothing to tune, and it is an error; OpenDelta adds biases
    there. Default position: the whole model.
    """

    name: ClassVar[str] = "bitfit"
    positions: ClassVar[tuple[str, ...]] = ("",)

    def accepts(self, path: str) -> bool:
        """Only arrays called `bias`."""
        return path.rpartition("/")[2] == "bias"
