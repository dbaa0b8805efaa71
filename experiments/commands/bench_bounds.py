"""`modicum bench attention-bounds`: how fast the TPU attention can be, by compiled programs alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ... import InputError


@dataclass(frozen=True)
class BoundsBench:
    """Count the instruction bundles of our TPU attention beside jax's splash attention.

    Needs libtpu, no TPU; a chip and width take about ten seconds.
    """

    chips: tuple[Literal["v5e", "v5p", "v6e"], ...] = ("v5e", "v5p", "v6e")
    widths: tuple[int, ...] = (128, 64)
    """Head widths."""
    out: Path | None = None
    """File for the table, such as docs/results/attention_bounds.md."""

    def run(self) -> int:
        """Print the table."""
        from ..bench.attention_biases import biases_table, measure_biases
        from ..bench.attention_bounds import document, measure
        from ..bench.attention_tpu import missing
        from .progress import notice

        if reason := missing():
            raise InputError(f"attention-bounds compiles for TPUs: {reason}")
        if min(self.widths, default=0) < 1:
            raise InputError(f"widths={self.widths} must be numbers of at least 1")
        bounds = measure(self.chips, self.widths, notice)
        page = document(bounds, list(biases_table(measure_biases(self.chips))))
        if self.out is not None:
            self.out.write_text(page)
        print(page)
        return 0
