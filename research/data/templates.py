"""Texts made of several columns: `{premise} means {hypothesis}?` with each row's values in place.

`{{` and `}}` stand for braces. Nothing else of Python's format language is understood.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass

from ... import InputError
from .sources import Source

__all__ = ["Template"]


@dataclass(frozen=True)
class Template:
    """A text with the names of columns in braces.

    Raises:
        InputError: for a brace that is not closed, a conversion or format, and a text that names no column.
    """

    text: str

    def __post_init__(self) -> None:
        if not self.columns:
            raise InputError(f"template {self.text!r} names no column; write one in braces, such as {{text}}")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it names, in order, each once."""
        return tuple(dict.fromkeys(column for _, column in self._parts() if column))

    def texts(self, source: Source) -> list[str]:
        """The text of each row; raises `InputError` for a column that is not there or holds no text."""
        values = {name: source.texts_in(name) for name in self.columns}
        parts = list(self._parts())
        return [
            "".join(before + (values[name][row] if name else "") for before, name in parts)
            for row in range(len(source))
        ]

    def _parts(self) -> Iterator[tuple[str, str]]:
        """Pairs of a text and the column that follows it, "" for none."""
        try:
            for before, name, form, conversion in string.Formatter().parse(self.text):
                if name is not None and (not name or form or conversion):
                    raise ValueError("only the name of a column may be in braces")
                yield before, name or ""
        except ValueError as error:
            raise InputError(f"template {self.text!r}: {error}; {{{{ and }}}} stand for braces") from None
