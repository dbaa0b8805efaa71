"""One self-contained HTML page: summary cards, sections with tables and figures, what to try next.

The page loads nothing from anywhere, follows the reader's light or dark setting, prints, and fits a phone:
what is wide scrolls in its own box. All text is escaped; the only markup taken as it is are SVG figures.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ... import InputError, __version__
from .runs import write_atomically
from .tables import Table

TEMPLATE = "report.html.jinja"
EMPHASIS = re.compile(r"\*(\w[^*]*)\*")


@dataclass(frozen=True)
class Card:
    """One number of the summary: what it is, its value as text with its unit, and a short note."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """An SVG element (of `figures`) and the sentence below it."""

    svg: str
    caption: str = ""

    def __post_init__(self) -> None:
        if not self.svg.lstrip().startswith("<svg"):
            raise InputError(f"figure: text begins with {self.svg.lstrip()[:20]!r}; give an <svg> element")


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs of plain text, then tables, then figures (an SVG alone has no caption)."""

    title: str
    prose: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure | str] = ()

    def framed(self) -> list[Figure]:
        """The figures, each with its caption."""
        return [figure if isinstance(figure, Figure) else Figure(figure) for figure in self.figures]


@dataclass(frozen=True)
class Report:
    """The page: `summary` is one sentence; `details` maps headings to long text that is folded away."""

    title: str
    summary: str = ""
    cards: Sequence[Card] = ()
    sections: Sequence[Section] = ()
    next_steps: Sequence[str] = ()
    details: Mapping[str, str] | None = None

    def html(self) -> str:
        """The page as text."""
        return _template().render(report=self, details=self.details or {}, version=__version__) + "\n"

    def write(self, path: Path) -> Path:
        """Write the page so that it is wholly there or as it was; returns the path."""
        write_atomically(path, self.html())
        return path


def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    text = resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["emphasised"] = emphasised
    return environment.from_string(text)


def emphasised(caption: str) -> str:
    """A caption, which Markdown tables have too, as HTML: escaped, and `*word*` in italics."""
    from markupsafe import Markup, escape

    return Markup(EMPHASIS.sub(r"<em>\1</em>", str(escape(caption))))
