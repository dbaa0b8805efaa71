"""`modicum bench attention`: ours beside its peers, and the block sizes that are best on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ... import InputError

if TYPE_CHECKING:
    from ..bench.attention_job import AttentionJob


@dataclass(frozen=True)
class AttentionBench:
    """Measure each of our attentions beside the plain softmax, jax.nn's and PyTorch's SDPA, in one run.

    JAX and PyTorch have a process each and all take turns, round by round, on this machine's accelerator if
    it has one. Reported are medians: wall and processor time, TFLOP/s of the products that cannot be avoided,
    and XLA's temporary memory, forward (f) and with the backward pass (f+b).
    """

    lengths: tuple[int, ...] = (512, 2048)
    """Queries, and as many keys. The plain softmax at 8192 takes 6 GB: measure that with --rounds 1."""
    width: int = 64
    """Of a head."""
    heads: int = 8
    kv_heads: int | None = None
    """Key/value heads; as many as heads without."""
    batch: int = 1
    mask: Literal["causal", "full", "window", "packed"] = "causal"
    window: int = 1024
    """Keys before itself that a query of a window sees."""
    documents: int = 8
    """Documents of a packed row, causal each."""
    bias: Literal["none", "dense", "bucketed", "alibi"] = "none"
    """Dense: one for all batch rows. Peers are given the others written out."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    rounds: int = 5
    """Turns of each contender, after one that is not counted (with 1: none is)."""
    forward_only: bool = False
    """Without the backward pass."""
    without: tuple[str, ...] = ()
    """Who does not take part: names as the table has them, such as SDPA or "plain softmax"."""
    cpu: bool = False
    """On the processors even where there is an accelerator."""
    threads: int = 0
    """Processors for each contender; 0: all."""
    tune: bool = False
    """Instead: try block sizes, and write the best to the table that implementations read."""
    chips: tuple[Literal["v5e", "v5p", "v6e"], ...] = ()
    """With --tune: TPUs that need not be there, whose tiles are ranked by the compiler's instruction bundles
    for full and causal masks; static counts, no times. Needs libtpu."""
    table: Path | None = None
    """Another file than the package's own for that table."""
    out: Path | None = None
    """Folder for the table and for every single timing."""

    def run(self) -> int:
        """Print the table."""
        from ..bench.attention_job import AttentionJob

        if min(self.lengths, default=0) < 2:
            raise InputError(f"lengths={self.lengths} must be numbers of at least 2")
        if self.window < 0:
            raise InputError(f"window={self.window} must be at least 0")
        job = AttentionJob(
            batch=self.batch,
            heads=self.heads,
            kv_heads=self.heads if self.kv_heads is None else self.kv_heads,
            width=self.width,
            mask=self.mask,
            bias=self.bias,
            dtype=self.dtype,
            window=self.window,
            documents=self.documents,
        )
        if self.chips and not self.tune:
            raise InputError(
                f"chips={self.chips} are for --tune; nothing is measured on a chip that is not there"
            )
        if self.chips:
            return self._rank()
        return self._tune(job) if self.tune else self._measure(job)

    def _measure(self, job: AttentionJob) -> int:
        from ..bench.attention import measure_attention
        from ..bench.attention_report import summary, write
        from .options import require_folder
        from .progress import notice

        require_folder(self.out)
        seen = measure_attention(
            job,
            lengths=self.lengths,
            rounds=self.rounds,
            backward=not self.forward_only,
            without=self.without,
            cpu=self.cpu,
            threads=self.threads,
            report=notice,
        )
        print(summary(seen))
        if self.out is not None:
            write(seen, self.out)
        return 0

    def _tune(self, job: AttentionJob) -> int:
        from ...models.kernels.block_sizes import TABLE, read, written
        from ..bench.attention_tuning import tune
        from .progress import notice

        if self.rounds < 1:
            raise InputError(f"rounds={self.rounds} must be at least 1")
        path = self.table or TABLE
        known = read(path if path.exists() else TABLE)
        table = tune(
            job, known, lengths=self.lengths, rounds=self.rounds, without=self.without, report=notice
        )
        path.write_text(written(table))
        print(f"{path} has the block sizes")
        return 0

    def _rank(self) -> int:
        from ...models.kernels.block_sizes import TABLE, read, written
        from ..bench.attention_tiles import ranked, steps_of
        from ..bench.attention_tpu import missing
        from .progress import notice

        if self.mask not in ("causal", "full") or self.bias != "none":
            told = f"mask={self.mask}, bias={self.bias}"
            raise InputError(f"{told}: --chips ranks tiles for full and causal masks without bias alone")
        if reason := missing():
            raise InputError(f"--chips compiles for TPUs: {reason}")
        path = self.table or TABLE
        known = read(path if path.exists() else TABLE)
        steps = steps_of(self.chips, self.width, self.dtype)
        table = ranked(steps, known, width=self.width, dtype=self.dtype, lengths=self.lengths, report=notice)
        path.write_text(written(table))
        print(f"{path} has the block sizes, by static counts of bundles and no times")
        return 0
