"""The running Python's own standard library as a corpus and a classification task.

Real text that is on every machine: some six million characters of code and prose. The task is to
tell which part of the library a few lines come from. The parts follow the chapters of the Library
Reference (docs.python.org/3/library) and consist of modules that every CPython ≥ 3.11 has, Debian's
split installation included.

What keeps the task honest:
    * It is split by module: all lines of one file are in one split, chosen by a hash of its path. The
      language model is trained on the train split too, so it has never seen dev and test modules.
    * Lines that import are left out, and every word that names one of the parts' modules, or a part,
      is replaced by `NAME` in all snippets, so that no snippet says whence it comes. Names inside
      longer identifiers (`HTTPServer`) stay: they are content.
    * Every part gives equally many snippets, evenly from its modules.

Left out of the corpus: tests; tables rather than text (`encodings`, `pydoc_data`, `html/entities`,
build data); folders that some installations lack (`idlelib`, `tkinter`, `ensurepip`, `venv`, …), so
that one version of Python gives nearly one corpus; and files that are not UTF-8. The text still
differs from version to version: the fingerprint says so.
"""

import hashlib
import random
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets

from ... import InputError
from .sources import Source

__all__ = ["PARTS", "Document", "corpus_fingerprint", "library_documents", "mask_names", "snippets"]

PARTS: Mapping[str, tuple[str, ...]] = {
    "networking": ("asyncio", "selectors", "socket", "ssl", "socketserver", "signal"),
    "concurrency": (
        "multiprocessing", "concurrent", "threading", "subprocess", "queue", "sched", "contextvars",
    ),
    "mail": ("email", "mailbox", "mimetypes", "smtplib", "imaplib", "poplib", "quopri", "base64"),
    "web": ("http", "urllib", "xmlrpc", "wsgiref", "webbrowser", "ftplib", "ipaddress"),
    "markup": ("xml", "html", "_markupbase", "json", "plistlib", "tomllib", "csv", "configparser"),
    "importing": ("importlib", "zipimport", "pkgutil", "runpy", "modulefinder", "zipapp", "site", "pyclbr"),
    "testing": ("unittest", "doctest", "pdb", "bdb", "trace", "timeit", "cProfile", "profile", "pstats"),
    "numbers": (
        "decimal", "_pydecimal", "fractions", "statistics", "random", "numbers", "datetime", "_pydatetime",
        "_strptime", "calendar", "zoneinfo", "colorsys", "heapq", "bisect",
    ),
}  # fmt: skip
"""Part -> its top-level modules and packages."""

OTHER = "other"
SKIPPED_FOLDERS = frozenset((
    "test", "tests", "idle_test", "__phello__", "__pycache__",
    "encodings", "pydoc_data",
    "distutils", "ensurepip", "idlelib", "lib2to3", "msilib", "tkinter", "turtledemo", "venv", "_pyrepl",
    "site-packages", "dist-packages", "lib-dynload",
))  # fmt: skip
SKIPPED_FILES = re.compile(r"config-.*|_sysconfigdata.*|html/entities\.py|__hello__\.py|sitecustomize\.py")
SHARES: Mapping[str, float] = {"test": 0.15, "dev": 0.1}
"""Share of a part's characters that goes to each split; the rest is `train`."""
LARGEST = 0.5
"""The largest module a split takes, as a fraction of its share."""


@dataclass(frozen=True)
class Document:
    """One module: its path below the library (`email/header.py`), text, part and split."""

    path: str
    text: str
    part: str
    split: str


def library_documents(root: Path | None = None) -> list[Document]:
    """The modules of the standard library in `root` (the running Python's by default), by path.

    Raises:
        InputError: where a part has no module for each split: no full standard library is there.
    """
    root = Path(root if root is not None else sysconfig.get_path("stdlib"))
    texts = dict(_modules(root))
    parts = {path: _part_of(path) for path in texts}
    splits: dict[str, str] = {}
    for part in [*PARTS, OTHER]:
        own = {path: len(text) for path, text in texts.items() if parts[path] == part}
        if len(own) < 3:
            reason = f"{len(own)} modules of the part {part!r}, 3 are needed"
            raise InputError(f"{root}: no standard library there: {reason}")
        splits.update(_split(own))
    return [Document(path, texts[path], parts[path], splits[path]) for path in sorted(texts)]


def corpus_fingerprint(documents: Sequence[Document]) -> str:
    """Digest of the paths, parts, splits and texts."""
    digest = hashlib.sha256()
    for document in documents:
        for field in (document.path, document.part, document.split, document.text):
            digest.update(f"{len(field)}:{field}".encode())
    return digest.hexdigest()[:16]


def snippets(
    documents: Sequence[Document], split: str, per_part: int, lines: int = 12, seed: int = 0
) -> Source:
    """A balanced set of snippets of `lines` consecutive lines, with the part as label.

    Blank lines and imports do not count as lines, names are masked (see the module's docstring), no two
    snippets overlap, and the modules of a part take turns. Each part gives `per_part` snippets, or all
    parts as many as the smallest has. Columns: text, label, path.
    """
    chosen = {part: _of_part(documents, part, split, lines, seed) for part in PARTS}
    count = min(per_part, *(len(rows) for rows in chosen.values()))
    if count < 1:
        short = min(chosen, key=lambda part: len(chosen[part]))
        raise InputError(f"the {split} modules of {short!r} have no {lines} lines in a row")
    rows = [row for own in chosen.values() for row in own[:count]]
    random.Random(seed).shuffle(rows)
    key = f"{corpus_fingerprint(documents)}|{split}|{count}|{lines}|{seed}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return Source(
        f"standard library ({split})", split, datasets.Dataset.from_list(rows), "text", "label", digest
    )


def mask_names(text: str) -> str:
    """`text` with every word that names a part or one of the parts' modules replaced by `NAME`."""
    return NAMES.sub("NAME", text)


def _names() -> re.Pattern[str]:
    words = {*PARTS, *(module for modules in PARTS.values() for module in modules)}
    ordered = sorted(words, key=len, reverse=True)
    return re.compile(rf"(?<![A-Za-z0-9_])(?:{'|'.join(ordered)})(?![A-Za-z0-9_])", re.IGNORECASE)


NAMES = _names()
IMPORT = re.compile(r"\s*(>>> )?(import\s+\w|from\s+[\w.]+\s+import\b|__all__\b)")


def _modules(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts) or SKIPPED_FILES.match(relative.as_posix()):
            continue
        try:
            text = path.read_text("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            yield relative.as_posix(), text


def _part_of(path: str) -> str:
    module = path.split("/")[0].removesuffix(".py")
    return next((part for part, modules in PARTS.items() if module in modules), OTHER)


def _split(sizes: Mapping[str, int]) -> dict[str, str]:
    """Path -> split: in the order of their hashes, modules go to test, then dev, until it has its share.

    A module that would be most of a split is passed over, so that no split is one author's voice.
    """
    left = sorted(sizes, key=lambda path: hashlib.sha256(path.encode()).digest())
    total, chosen = sum(sizes.values()), {}
    for split, share in SHARES.items():
        wanted, taken = share * total, 0
        for path in list(left):
            if taken < wanted and sizes[path] <= LARGEST * wanted:
                chosen[path] = split
                taken += sizes[path]
                left.remove(path)
        if not taken:  # only large modules are left
            smallest = min(left, key=lambda path: sizes[path])
            chosen[smallest] = split
            left.remove(smallest)
    return {path: chosen.get(path, "train") for path in sizes}


def _of_part(
    documents: Sequence[Document], part: str, split: str, lines: int, seed: int
) -> list[dict[str, str]]:
    """The snippets of one part and split, modules taking turns, each module's in a seeded order."""
    queues = []
    for document in documents:
        if (document.part, document.split) == (part, split):
            pieces = _cut(document.text, lines)
            random.Random(f"{seed} {document.path}").shuffle(pieces)
            queues.append([{"text": text, "label": part, "path": document.path} for text in pieces])
    longest = max((len(queue) for queue in queues), default=0)
    return [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]


def _cut(text: str, lines: int) -> list[str]:
    """Consecutive pieces of `lines` lines each; what is left at the end is dropped."""
    kept = [line.rstrip() for line in mask_names(_without_imports(text)).splitlines() if line.strip()]
    return ["\n".join(kept[at : at + lines]) for at in range(0, len(kept) - lines + 1, lines)]


def _without_imports(text: str) -> str:
    """`text` without its import statements, continued lines included."""
    kept, open_brackets, continued = [], 0, False
    for line in text.splitlines():
        if open_brackets > 0 or continued or IMPORT.match(line):
            open_brackets = max(
                0, open_brackets + sum(line.count(c) for c in "([") - sum(line.count(c) for c in ")]")
            )
            continued = line.endswith("\\")
        else:
            kept.append(line)
    return "\n".join(kept)
