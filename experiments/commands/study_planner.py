"""`modicum study planner-validation|planner-compiled|cost-claims`: the planner beside published runs and
compilers, and the talks' figures of cost.
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


@dataclass(frozen=True)
class PlannerCompiled:
    """The planner's memory and time beside compiled train steps, on TPUs that need not be there."""

    kept: Path = Path("docs/results/planner_compiled.jsonl")
    """What compilers said; cases that it has are not compiled again."""
    markdown: Path | None = None
    """Also write the page into this file."""
    smoke: bool = False
    """One tiny case."""

    def run(self) -> int:
        """Compile what is not yet known, and print the page."""
        from ...parallel.plan import Assumptions
        from ..planner_compiled import CASES, SMOKE, measure, page
        from .progress import say

        found = measure(SMOKE if self.smoke else CASES, None if self.smoke else self.kept, say)
        text = page(found, Assumptions())
        if self.markdown is not None:
            self.markdown.parent.mkdir(parents=True, exist_ok=True)
            self.markdown.write_text(text)
        print(text, end="")
        return 0
