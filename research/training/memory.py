"""What a compiled program needs, by XLA's own account."""

from __future__ import annotations

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class CompiledMemory:
    """Bytes on one device: arguments, outputs that are not arguments' buffers reused, temporaries."""

    arguments: int
    outputs: int
    temporaries: int

    @property
    def total(self) -> int:
        """Bytes in use while the program runs."""
        return self.arguments + self.outputs + self.temporaries


def compiled_memory(compiled: jax.stages.Compiled) -> CompiledMemory | None:
    """Read `memory_analysis()` of a compiled program; None where the backend gives none.

    Donated arguments count once.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return CompiledMemory(analysis.argument_size_in_bytes, outputs, analysis.temp_size_in_bytes)
