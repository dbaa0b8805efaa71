"""`modicum study planner-validation|cost-claims`: the planner beside published runs, and the talks' figures
of cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PlannerValidation:
    """The planner's predictions beside published training runs, out-of-memory reports and the compiler."""

    compiled: Path = Path("docs/results/delta_memory.jsonl")
    """What the compiler said, as `modicum bench tune-memory --kept` left it."""
    markdown: Path | None = None
    """Also write the page into this file."""

    def run(self) -> int:
        """Print the page."""
        from ..planner_validation import write_validation

        print(write_validation(self.compiled, self.markdown), end="")
        return 0


@dataclass(frozen=True)
class CostClaims:
    """The talks' figures of cost recomputed: consistent or not, and under which batch or utilisation."""

    markdown: Path | None = None
    """Also write the page into this file."""

    def run(self) -> int:
        """Print the page."""
        from ..cost_claims import write_claims

        print(write_claims(self.markdown), end="")
        return 0
