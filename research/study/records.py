"""The metrics file of a run: one JSON object a line, in the order of the steps."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from ... import InputError

STEP = "step"


class MetricsLog:
    """Appends records to a metrics file; each is on its way to the disk when `append` returns.

    A record's step counts the completed train steps. Write a step's records before its checkpoint is saved:
    then the file of a run that was killed and resumed has the same records as an uninterrupted run's.
    """

    def __init__(self, file: IO[str] | None) -> None:
        self._file = file

    @classmethod
    def open(cls, path: Path, resume_step: int = 0, write: bool = True) -> Self:
        """The file at `path` cut back to the records up to `resume_step`, created where it is missing.

        With `write=False` nothing is read or written (for all processes but one).
        """
        if not write:
            return cls(None)
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_back(path, resume_step)
        return cls(open(path, "a", encoding="utf-8"))

    def append(self, step: int, values: Mapping[str, Any]) -> None:
        """Add one record of numbers or text measured after `step` completed train steps."""
        if self._file is None:
            return
        record = {STEP: int(step), **{name: _scalar(name, value) for name, value in values.items()}}
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; the records stay."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line that was cut off in the middle is left out.

    Any other line that is not a record raises InputError with its number.
    """
    lines = path.read_bytes().split(b"\n")
    last = len(lines)  # split leaves b"" after the final newline, or the half-written line
    return [_parse(line, path, number) for number, line in enumerate(lines, 1) if number < last and line]


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}, line {number}: not JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get(STEP), int):
        raise InputError(f"{path}, line {number}: not a record with an integer {STEP!r}")
    return record


def _cut_back(path: Path, step: int) -> None:
    """Keep the leading records up to `step`, byte for byte; the rest belongs to steps that are redone."""
    if not path.exists():
        return
    kept = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") or _parse(line, path, number)[STEP] > step:
                break
            kept += len(line)
    os.truncate(path, kept)


def _scalar(name: str, value: Any) -> float | int | str | bool | None:
    """A Python scalar; array libraries' zero-dimensional arrays are converted."""
    plain = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if plain is None or isinstance(plain, bool | int | float | str):
        return plain
    raise InputError(f"metric {name!r} is a {type(value).__name__}; a record holds numbers and text")
