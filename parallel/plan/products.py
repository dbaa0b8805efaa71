"""Floating-point operations of a compiled program's products."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from .hlo import Computation, Instruction

WINDOW = re.compile(r"(\w+)=([\dx_\-]+)")
KERNEL_COST = re.compile(r'"cost_estimate":\{[^}]*"flops":"?(\d+)')


def product_flops(one: Instruction, here: Computation) -> float:
    """Operations of a product or of a hand-written kernel that states them; 0 of anything else."""
    if one.opcode == "dot":
        return dot_flops(one, here)
    if one.opcode == "convolution":
        return convolution_flops(one, here)
    stated = KERNEL_COST.search(one.text) if one.opcode == "custom-call" else None
    return float(stated[1]) if stated else 0.0


def dot_flops(one: Instruction, here: Computation) -> float:
    """2 for each number of the output and of the contracted sizes."""
    left = here.arrays(one.operands[0])
    contracted = math.prod(left[0].sizes[place] for place in one.sizes("lhs_contracting_dims")) if left else 0
    return 2.0 * one.arrays[0].count * contracted


def convolution_flops(one: Instruction, here: Computation) -> float:
    """2 for each number of the output, input feature and place of the window that meets a number.

    TPUs write products as convolutions: batches become space that is dilated so that each window meets one.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.text)
    arrays = [here.arrays(name) for name in one.operands[:2]]
    if labels is None or not all(arrays):
        return 0.0
    left, kernel = arrays[0][0].sizes, arrays[1][0].sizes
    window = dict(WINDOW.findall(_window_text(one.text)))
    space = [label for label in labels[2] if label.isdigit()]
    pairs = 1
    for place, label in enumerate(sorted(space, key=int)):
        given = left[labels[1].index(label)], one.arrays[0].sizes[labels[3].index(label)]
        pairs *= _meetings(*given, window, place)
    features = kernel[labels[2].index("i")]
    batch_groups = re.search(r"batch_group_count=(\d+)", one.text)
    output = math.prod(size for size, label in zip(one.arrays[0].sizes, labels[3]) if not label.isdigit())
    return 2.0 * output * features * pairs / (int(batch_groups[1]) if batch_groups else 1)


def _meetings(size: int, output: int, window: Mapping[str, str], place: int) -> int:
    """Pairs of an output's place and a window's place that meet a number of the input, along one axis."""

    def value(name: str, default: str) -> str:
        return window[name].split("x")[place] if name in window else default

    stride, base = int(value("stride", "1")), int(value("lhs_dilate", "1"))
    spread, before = int(value("rhs_dilate", "1")), int(value("pad", "0_0").split("_")[0])
    extent = (size - 1) * base + 1
    return sum(
        0 <= (at := out * stride + step * spread - before) < extent and at % base == 0
        for out in range(output)
        for step in range(int(value("size", "1")))
    )


def _window_text(text: str) -> str:
    found = re.search(r"window=\{([^}]*)\}", text)
    return found[1] if found else ""
