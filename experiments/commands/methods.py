"""Ways to tune, as subcommands of `modicum tune`. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...research.delta import Spec

HEAD = "classifier"


@dataclass(frozen=True)
class Lora:
    """Low-rank updates beside projections (Hu et al., 2021)."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    at: str = "attention/(query|value)"
    """Address of the modules it acts on."""

    def spec(self) -> Spec:
        """The delta and the classifier's head."""
        from ...research.delta import Full, LoRA

        return {self.at: LoRA(rank=self.rank, alpha=self.alpha, dropout=self.dropout), HEAD: Full()}


@dataclass(frozen=True)
class Adapter:
    """Bottleneck layers after attention and mlp (Houlsby et al., 2019)."""

    width: int = 24
    activation: str = "gelu"
    at: str = "(attention/output|mlp/down)"
    """Address of the modules it acts on."""

    def spec(self) -> Spec:
        """The delta and the classifier's head."""
        from ...research import delta

        return {self.at: delta.Adapter(self.width, self.activation), HEAD: delta.Full()}


@dataclass(frozen=True)
class Bitfit:
    """Biases only (Ben Zaken et al., 2022)."""

    at: str = "(query|key|value|output|up|gate|down|[a-z_]*norm)"
    """Address of the modules whose biases are tuned; the head's own is tuned anyway."""

    def spec(self) -> Spec:
        """The delta and the classifier's head."""
        from ...research.delta import BitFit, Full

        return {self.at: BitFit(), HEAD: Full()}


@dataclass(frozen=True)
class Probe:
    """A linear classifier on the frozen model."""

    def spec(self) -> Spec:
        """The classifier's head alone."""
        from ...research.delta import Full

        return {HEAD: Full()}


@dataclass(frozen=True)
class FullTuning:
    """All parameters."""

    def spec(self) -> None:
        """No delta: the loop trains the parameters themselves."""
        return None


TuningMethod = Lora | Adapter | Bitfit | Probe | FullTuning
