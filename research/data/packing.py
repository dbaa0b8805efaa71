"""Documents packed into rows of one length, by an index made once and kept on disk.

A document is its tokens and a final end token. A row holds one or more *pieces* (document, start,
length): it reads `document[start : start + length]` and learns to predict what follows each token,
`document[start + 1 : start + length + 1]`. So no target crosses a document, and every token but a
document's first is predicted exactly once, however long documents are cut. Cutting fills every row
but the last; with `cut=False` (prompts with their completions) a document stays in one row.

A row gives the fields of a language-model batch, each [length]:
    tokens, targets int32; weights float32 (0: not learned); segments int32 (1, 2, … per piece,
    0: padding); positions int32 (from 0 in each piece).
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ... import InputError
from .tokenizers import Tokenizer

__all__ = ["Packed", "pack", "packed_corpus"]

FORMAT = 1
ARRAYS = ("tokens", "offsets", "prompts", "pieces", "rows")
ENCODE_AT_ONCE = 1000

Document = str | tuple[str, str]


@dataclass(frozen=True)
class Packed:
    """Rows of `length` tokens; `packed[i]` is one row's fields as numpy arrays.

    Attributes:
        tokens: [N] every document's tokens, end tokens included, one after the other.
        offsets: [documents + 1] where each document starts in `tokens`.
        prompts: [documents] how many of its tokens are a prompt, which is read but not learned.
        pieces: [pieces, 3] document, start, length.
        rows: [rows + 1] where each row starts in `pieces`.
        length: T, tokens a row.
        pad: the token that fills a row.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    prompts: np.ndarray
    pieces: np.ndarray
    rows: np.ndarray
    length: int
    pad: int = 0

    def __len__(self) -> int:
        return len(self.rows) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = {
            "tokens": np.full(self.length, self.pad, np.int32),
            "targets": np.full(self.length, self.pad, np.int32),
            "weights": np.zeros(self.length, np.float32),
            "segments": np.zeros(self.length, np.int32),
            "positions": np.zeros(self.length, np.int32),
        }
        at = 0
        pieces = self.pieces[self.rows[index] : self.rows[index + 1]]
        for segment, (document, start, length) in enumerate(pieces.tolist(), start=1):
            begin, here = int(self.offsets[document]) + start, slice(at, at + length)
            row["tokens"][here] = self.tokens[begin : begin + length]
            row["targets"][here] = self.tokens[begin + 1 : begin + length + 1]
            row["positions"][here] = np.arange(length)
            # the target at position j of the piece is the document's token start + j + 1
            row["weights"][here] = np.arange(start + 1, start + length + 1) >= self.prompts[document]
            row["segments"][here] = segment
            at += length
        return row


def pack(
    documents: Iterable[Sequence[int] | np.ndarray],
    length: int,
    eos: int,
    *,
    prompts: Sequence[int] | None = None,
    cut: bool = True,
    pad: int = 0,
) -> Packed:
    """Pack documents (token ids, without end tokens) in their order into rows of `length`.

    Args:
        documents: each one's token ids; those without any are left out.
        length: T, tokens a row.
        eos: the end token, put after every document.
        prompts: how many of each document's first tokens are not to be learned; none by default.
        cut: whether a document may go on in the next row; otherwise one that is too long is an error.
        pad: the token that fills a row.

    Raises:
        InputError: where there is nothing to learn, or `cut` is False and a document is too long.
    """
    if length < 1:
        raise InputError(f"length is {length}; a row needs at least 1 token")
    kept = [(number, np.asarray(ids, np.int32)) for number, ids in enumerate(documents)]
    kept = [(number, ids) for number, ids in kept if len(ids)]
    if not kept:
        raise InputError("nothing to pack: no document has any token")
    offsets = np.cumsum([0] + [len(ids) + 1 for _, ids in kept], dtype=np.int64)
    tokens = np.full(offsets[-1], eos, np.int32)
    for start, (_, ids) in zip(offsets, kept):
        tokens[start : start + len(ids)] = ids
    unlearned = np.asarray([prompts[number] if prompts is not None else 0 for number, _ in kept], np.int64)
    usable = np.diff(offsets) - 1  # the end token is a target only
    if not cut and usable.max() > length:
        longest = int(usable.argmax())
        raise InputError(
            f"document {kept[longest][0] + 1} has {usable[longest]} tokens, a row {length}; "
            "make rows longer, leave it out, or allow cutting"
        )
    pieces, rows = _fill(usable.tolist(), length, cut)
    return Packed(tokens, offsets, unlearned, pieces, rows, length, pad)


def _fill(usable: Sequence[int], length: int, cut: bool) -> tuple[np.ndarray, np.ndarray]:
    """The pieces of each document in order, and where each row starts among them."""
    pieces: list[tuple[int, int, int]] = []
    rows, room = [0], length
    for document, size in enumerate(usable):
        if not cut and size > room:
            rows.append(len(pieces))
            room = length
        start = 0
        while start < size:
            if room == 0:
                rows.append(len(pieces))
                room = length
            taken = min(size - start, room)
            pieces.append((document, start, taken))
            start, room = start + taken, room - taken
    return np.asarray(pieces, np.int64), np.asarray([*rows, len(pieces)], np.int64)


def packed_corpus(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    length: int,
    folder: Path,
    fingerprint: str,
    *,
    cut: bool = True,
) -> Packed:
    """The packed rows of a corpus, read from `folder` where they were made before.

    Args:
        documents: texts, or (prompt, completion) pairs of which only the completion is learned; not
            touched where the rows are there already.
        tokenizer: encodes them.
        length: T, tokens a row.
        folder: the cache; rows are kept in a sub-folder named by all they depend on.
        fingerprint: digest of the documents (`Source.fingerprint`).
        cut: see `pack`.
    """
    parts = [str(FORMAT), fingerprint, tokenizer.fingerprint, str(length), str(cut)]
    target = Path(folder) / f"packed-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}"
    if not (target / "index.json").is_file():
        packed = _encode_and_pack(documents, tokenizer, length, cut)
        write_atomically(target, lambda place: _write(packed, place))
    return _read(target)


def _encode_and_pack(documents: Iterable[Document], tokenizer: Tokenizer, length: int, cut: bool) -> Packed:
    encoded, prompts = [], []
    for group in _groups(documents, ENCODE_AT_ONCE):
        pairs = [("", document) if isinstance(document, str) else document for document in group]
        firsts = tokenizer.encode([prompt for prompt, _ in pairs])
        seconds = tokenizer.encode([completion for _, completion in pairs])
        prompts += [len(first) for first in firsts]
        encoded += [np.concatenate(both) for both in zip(firsts, seconds)]
    return pack(encoded, length, tokenizer.eos, prompts=prompts, cut=cut, pad=tokenizer.pad)


def _groups(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    group: list[Document] = []
    for document in documents:
        group.append(document)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _write(packed: Packed, folder: Path) -> None:
    for name in ARRAYS:
        np.save(folder / f"{name}.npy", getattr(packed, name))
    index = {"length": packed.length, "pad": packed.pad}
    (folder / "index.json").write_text(json.dumps(index))


def _read(folder: Path) -> Packed:
    index = json.loads((folder / "index.json").read_text())
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
    return Packed(**arrays, **index)


def write_atomically(target: Path, write: Callable[[Path], None]) -> None:
    """Fill the folder `target` by `write(temporary folder)` and a rename: it is there whole or not at all.

    Where another process was first, its folder stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        write(temporary)
        os.rename(temporary, target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
