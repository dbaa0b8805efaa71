"""Where texts come from: local files, folders of split files, globs of text files, or the Hugging Face hub.

    load_source("reviews.jsonl", label_column="label")     one file, counted as split `train`
    load_source("sst2", split="dev")                        a folder with train/dev/test files
    load_source("books/**/*.txt")                           every file one document
    load_source("stanfordnlp/sst2:default", text_column="sentence")    a hub name, `:configuration` optional

`datasets` reads them all; what a user can get wrong is checked here and said in one line.
"""

import codecs
import contextlib
import glob
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from ... import InputError
from .hub import load_from_hub, quiet_datasets, root_cause

__all__ = ["SPLITS", "Source", "load_source", "load_splits"]

SPLITS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "dev": ("dev", "valid", "validation", "val"),
    "test": ("test", "testing"),
}
"""Our names of the splits, and the names files and hub data sets use for them."""

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
READERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t", "quoting": 3}),  # 3: tab-separated files have no quoting
    ".parquet": ("parquet", {}),
    **{suffix: ("text", {"sample_by": "document"}) for suffix in TEXT_SUFFIXES},
}

TEXT_TYPES = ("string", "large_string")
LABEL_TYPES = (*TEXT_TYPES, "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


@dataclass(frozen=True)
class Source:
    """The rows of one split.

    Attributes:
        name: what the user gave.
        split: `train`, `dev` or `test`.
        rows: the rows, every column of them.
        text_column: the column that holds the text; checked to be text in every row.
        label_column: the column that holds the label, if asked for; checked to be there in every row.
        fingerprint: digest of the contents and the choice of columns; the same on every machine.
    """

    name: str
    split: str
    rows: datasets.Dataset
    text_column: str
    label_column: str | None
    fingerprint: str

    def __len__(self) -> int:
        return len(self.rows)

    def texts(self) -> Iterator[str]:
        """The texts in order."""
        return iter(self.rows[self.text_column])

    def texts_in(self, column: str) -> list[str]:
        """The texts of another column; `InputError` where it is not there, or is not text in every row."""
        _check_text(self.rows, self.name, column)
        return list(self.rows[column])

    def labels(self) -> list[Any]:
        """The labels in order, as the data has them: names or numbers."""
        if self.label_column is None:
            raise InputError(f"{self.name}: no label column was named; the columns are: {_listed(self.rows)}")
        return list(self.rows[self.label_column])


def load_source(
    name: str | Path,
    split: str | None = None,
    text_column: str = "text",
    label_column: str | None = None,
    cache: Path | None = None,
) -> Source:
    """One split of the data `name` (module docstring); `train` unless `split` says otherwise.

    Args:
        name: a file, a folder, a glob pattern or a hub name.
        split: any of the names in `SPLITS`.
        text_column: the column that holds the text.
        label_column: the column that holds the label; None where none is needed.
        cache: folder for the files `datasets` converts to; its own default otherwise.

    Raises:
        InputError: missing file, absent split or column, no rows, malformed line, row without text or label.
    """
    wanted = _canonical(split or "train")
    if wanted is None:
        raise InputError(f"split {split!r} is unknown; valid: {', '.join(SPLITS)}")
    places = _places(str(name))
    if places is None:
        rows, fingerprint = load_from_hub(str(name), SPLITS[wanted], cache)
    elif wanted not in places:
        raise InputError(f"{name}: no {wanted} split; there is: {', '.join(sorted(places)) or 'nothing'}")
    else:
        rows, fingerprint = _read(places[wanted], cache)
    shown = str(places[wanted][0]) if places is not None and len(places[wanted]) == 1 else str(name)
    _check_columns(rows, shown, text_column, label_column)
    key = f"{fingerprint}\n{text_column}\n{label_column}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return Source(shown, wanted, rows, text_column, label_column, digest)


def load_splits(
    name: str | Path, text_column: str = "text", label_column: str | None = None, cache: Path | None = None
) -> dict[str, Source]:
    """Every split a local file, folder or glob has, by our names; of a hub name those that load."""
    places = _places(str(name))
    if places is not None:
        return {split: load_source(name, split, text_column, label_column, cache) for split in places}
    found = {"train": load_source(name, "train", text_column, label_column, cache)}
    for split in ("dev", "test"):
        with contextlib.suppress(InputError):
            found[split] = load_source(name, split, text_column, label_column, cache)
    return found


def _canonical(split: str) -> str | None:
    return next((ours for ours, names in SPLITS.items() if split.lower() in names), None)


def _places(name: str) -> dict[str, list[Path]] | None:
    """The files of every split in the order of `SPLITS`; None where `name` can only be a hub name."""
    path = Path(name).expanduser()
    if path.is_dir():
        return _split_files(path)
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise InputError(f"{name}: cannot read {path.suffix!r} files; valid: {', '.join(READERS)}")
        return {"train": [path]}
    if any(sign in name for sign in "*?["):
        return {"train": _matches(name)}
    looks_local = path.suffix.lower() in READERS or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local:
        raise InputError(f"{name}: no such file or folder")
    return None


def _split_files(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        split = _canonical(path.stem)
        if path.is_file() and path.suffix.lower() in READERS and split is not None:
            found.setdefault(split, []).append(path)
    for split, paths in found.items():
        if len(paths) > 1:
            names = ", ".join(path.name for path in paths)
            raise InputError(f"{folder}: more than one file is its {split} split: {names}")
    if not found:
        raise InputError(
            f"{folder}: no file named train, dev or test ({', '.join(READERS)}) in this folder; "
            f"for a folder of text files give a pattern such as {folder}/**/*.txt"
        )
    return {split: found[split] for split in SPLITS if split in found}


def _matches(pattern: str) -> list[Path]:
    paths = [Path(name) for name in sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise InputError(f"{pattern}: no file matches")
    readers = {READERS.get(path.suffix.lower(), READERS[".txt"])[0] for path in paths}
    if len(readers) > 1:
        raise InputError(f"{pattern}: matches files of different kinds ({', '.join(sorted(readers))})")
    return paths


def _read(paths: Sequence[Path], cache: Path | None) -> tuple[datasets.Dataset, str]:
    """The rows of the files and the digest of their bytes."""
    contents = [_check_file(path) for path in paths]
    digest = hashlib.sha256("\n".join(contents).encode()).hexdigest()
    builder, options = READERS.get(paths[0].suffix.lower(), READERS[".txt"])
    try:
        with quiet_datasets():
            rows = datasets.load_dataset(
                builder,
                data_files=[str(path) for path in paths],
                split="train",
                cache_dir=str(cache) if cache is not None else None,
                **options,
            )
    except Exception as error:  # whatever pandas, pyarrow and datasets raise is about the file
        raise InputError(f"{paths[0]}: cannot be read as {builder}: {root_cause(error)}") from error
    return rows, digest


def _check_file(path: Path) -> str:
    """The digest of the bytes of `path`, after checking what the readers report badly or not at all."""
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    digest = hashlib.sha256()
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = rows = 0
    with path.open("rb") as file:
        for line in file:
            digest.update(line)
            lines += 1
            if path.suffix.lower() != ".parquet":
                _decode(decoder, line, path, lines)
            if path.suffix.lower() in (".jsonl", ".ndjson") and line.strip():
                _check_json_line(line, path, lines)
                rows += 1
    if path.suffix.lower() in (".jsonl", ".ndjson") and not rows:
        raise InputError(f"{path}: the file has no rows")
    return digest.hexdigest()


def _decode(decoder: codecs.IncrementalDecoder, line: bytes, path: Path, number: int) -> None:
    try:
        decoder.decode(line)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: line {number} is not UTF-8 ({error.reason})") from error


def _check_json_line(line: bytes, path: Path, number: int) -> None:
    try:
        row = json.loads(line.decode().rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {number} is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict):
        raise InputError(f"{path}: line {number} is a JSON {_json_kind(row)}; each line must be an object")


def _json_kind(value: Any) -> str:
    names = {list: "array", str: "string", int: "number", float: "number", bool: "boolean"}
    return names.get(type(value), "null")


def _check_columns(rows: datasets.Dataset, name: str, text_column: str, label_column: str | None) -> None:
    if len(rows) == 0:
        raise InputError(f"{name}: no rows")
    for column in [text_column] + ([label_column] if label_column is not None else []):
        _check_named(rows, name, column)
    _check_text(rows, name, text_column)
    if label_column is not None:
        _check_present(rows, name, label_column, "label")
        _check_type(rows, name, label_column, LABEL_TYPES, "names or whole numbers")


def _check_named(rows: datasets.Dataset, name: str, column: str) -> None:
    if column not in rows.column_names:
        raise InputError(f"{name}: no column {column!r}; the columns are: {_listed(rows)}")


def _check_text(rows: datasets.Dataset, name: str, column: str) -> None:
    _check_named(rows, name, column)
    _check_present(rows, name, column, "text")
    _check_type(rows, name, column, TEXT_TYPES, "text")


def _check_type(rows: datasets.Dataset, name: str, column: str, valid: Sequence[str], what: str) -> None:
    kind = str(rows.data.schema.field(column).type)
    if kind not in valid:
        raise InputError(f"{name}: column {column!r} holds {kind}, not {what}")


def _check_present(rows: datasets.Dataset, name: str, column: str, what: str) -> None:
    values = rows.data.column(column)
    if values.null_count:
        first = values.is_null().index(True).as_py() + 1
        raise InputError(f"{name}: row {first} has no {what} in column {column!r}")


def _listed(rows: datasets.Dataset) -> str:
    return ", ".join(rows.column_names)
