"""What a bias adds to a tile of our TPU attention, in the compiler's instruction bundles.

A bias that is spread or looked up inside of the kernels takes no memory, and more instructions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .attention_bounds import apart, bundles_of_case, named

SIDE, WIDTH = 512, 64  # queries and keys of a tile, as for these biases; and of a head
BIASES = ("none", "Bucketed", "Relations")
KERNELS = {"forward": "attention_forward", "dq, dk, dv": "attention_all_gradients"}


class Biased(NamedTuple):
    """The bundles of a kernel for one tile without mask, under a bias."""

    chip: str
    kernel: str
    bias: str
    bundles: int


def measure_biases(chips: Sequence[str]) -> list[Biased]:
    """Of every chip, kernel and bias."""
    return [Biased(*each) for each in apart("attention_biases", chips)]


def biases_table(found: Sequence[Biased]) -> Iterator[str]:
    """A line a chip and kernel: bundles, and how many times those without a bias."""
    yield f"| chip | kernel | {' | '.join(BIASES)} |"
    yield "|" + "---|" * (2 + len(BIASES))
    for chip, kernel in dict.fromkeys((each.chip, each.kernel) for each in found):
        of = {each.bias: each.bundles for each in found if (each.chip, each.kernel) == (chip, kernel)}
        cells = [f"{of[bias]} ({of[bias] / of['none']:.1f}×)" for bias in BIASES[1:]]
        yield f"| {chip} | {kernel} | {of['none']} | {' | '.join(cells)} |"


def _counted(folder: Path, chips: Sequence[str]) -> Iterator[Biased]:
    from ...models.kernels import Bucketed, Full, Terms
    from ...models.kernels.tpu import Blocks, Tpu
    from .attention_tpu import CompiledCase, relations, zeros

    made: dict[str, Any] = {
        "none": lambda case: None,
        "Bucketed": lambda case: Bucketed(zeros(32, case.heads)),
        "Relations": relations,
    }
    tiles = Blocks(SIDE, SIDE, SIDE)
    for chip in chips:
        for bias in BIASES:
            terms = lambda case, make=made[bias]: Terms(Full(), make(case))  # noqa: E731
            case = CompiledCase(terms, 2 * SIDE, width=WIDTH, heads=2, kv_heads=2, batch=2)
            found = bundles_of_case(folder, case, chip, Tpu(forward=tiles, backward=tiles))
            for kernel, name in KERNELS.items():
                yield Biased(chip, kernel, bias, named(found, name))


if __name__ == "__main__":
    where, *of_chips = sys.argv[1:]
    for each in _counted(Path(where), of_chips):
        print(json.dumps(each), flush=True)
