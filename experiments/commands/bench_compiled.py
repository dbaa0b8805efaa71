"""`modicum bench attention-compiled`: our Hopper kernels compiled for an H100, without one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class AttentionCompiledBench:
    """Compile the Hopper attention kernels to sm_90a, forward and backward, as ptxas reports them.

    Needs JAX's CUDA plugin and NVIDIA's compiler (pip install 'jax[cuda13]'), but no GPU. Exits with 1 where
    a kernel spills registers.
    """

    only: str = ""
    """Shapes whose name contains this; all without."""
    out: Path | None = None
    """File for the table, Markdown."""

    def run(self) -> int:
        """Print the table."""
        from ..bench.attention_compiled import as_text, compile_all
        from .options import require_folder
        from .progress import notice

        require_folder(None if self.out is None else self.out.parent)
        kernels = compile_all(self.only, notice)
        text = as_text(kernels)
        print(text)
        if self.out is not None:
            self.out.write_text(text)
        return int(any(kernel.spill_stores for kernel in kernels))
