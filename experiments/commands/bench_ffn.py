"""`modicum bench ffn`: feed-forward layers of which a token uses some experts, beside the dense layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .options import require_folder
from .progress import notice


@dataclass(frozen=True)
class FeedForwardBench:
    """Time dense feed-forward layers and the same layers in experts behind an MLP router, in turn.

    Float32; many layers of distinct weights, so that these come from memory as in a model.
    """

    widths: tuple[Literal["t5-base", "t5-large"], ...] = ("t5-base", "t5-large")
    """768 × 3072 and 1024 × 4096, experts of 32 neurons."""
    shares: tuple[float, ...] = (0.1, 0.2)
    """Which parts of the neurons a token uses."""
    batch: tuple[int, ...] = (1, 2, 4, 8)
    """Tokens at a time."""
    contenders: tuple[str, ...] = ()
    """Implementations of `sparse_feed_forward`; none: all that this machine can. native compiles itself."""
    rounds: int = 15
    """Turns of each contender."""
    decode: tuple[str, ...] = ()
    """Presets, such as gpt2-medium, of which tokens are generated with dense and converted layers instead."""
    impl: str = "auto"
    """What converted layers compute with in --decode."""
    out: Path | None = None
    """Folder for the table."""

    def run(self) -> int:
        """Print the table."""
        from ..bench.ffn import measure_feed_forward
        from ..bench.ffn_report import summary, write

        require_folder(self.out)
        if self.decode:
            return self._decode()
        seen = measure_feed_forward(
            jobs=self.widths,
            shares=self.shares,
            batches=self.batch,
            contenders=self.contenders,
            rounds=self.rounds,
            report=notice,
        )
        print(summary(seen))
        if self.out is not None:
            write(seen, self.out)
        return 0

    def _decode(self) -> int:
        from ..bench.ffn_decode import decoding_table, measure_decoding

        found = [measure_decoding(name, self.shares, self.rounds, self.impl, notice) for name in self.decode]
        table = decoding_table(found)
        print(f"{table.caption}\n\n{table.markdown()}")
        if self.out is not None:
            table.write(self.out, "ffn-decode")
        return 0
