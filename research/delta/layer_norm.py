"""LayerNorm tuning: only scale and bias of the norms (Zhao et al., 2024, arXiv 2312.11420)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from .offsets import Offset

# `attention_norm`, `LayerNorm_0`, `RMSNorm`, `layer_norm1`, `norm`; `ln_1`, `ln_f`, `ln`.
NORM = re.compile(r"(?i)(?:\w*norm(?:_?\d+)?|ln(?:_\w+|\d+)?)")
SCALE_OR_BIAS = re.compile(r"scale|bias|weight|offset|gamma|beta")


@dataclass(frozen=True)
class LayerNormTuning(Offset):
    """`scale + offset` and `bias + offset` of every normalisation layer below the address, starting at zero.

    A norm is told by the name of the module that holds the array: one that ends in `norm`, with or without
    a number, whatever its case, or `ln`, `ln_1`, `ln_f`. RMS norms have a scale alone. PEFT's `LN_TUNING`
    trains copies instead, which has the same gradients. Default position: the whole model.
    """

    name: ClassVar[str] = "layer_norm"
    positions: ClassVar[tuple[str, ...]] = ("",)

    def accepts(self, path: str) -> bool:
        """Only the scale and the bias of a module that is called a norm."""
        above, _, name = path.rpartition("/")
        return bool(SCALE_OR_BIAS.fullmatch(name) and NORM.fullmatch(above.rpartition("/")[2]))
