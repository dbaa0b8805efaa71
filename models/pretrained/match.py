"""The tensors of a file beside those that a model needs: every one has a use, or the error lists it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from ... import InputError
from .assemble import leaf_block
from .family import Family
from .files import TensorFiles, listed
from .mapping import Entry, Index, Piece, Shape

Leaves = Mapping[str, jax.ShapeDtypeStruct]
FLOATING = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Matched:
    """Which pieces fill which leaf, and what is over on either side.

    `left_out` are their tensors that belong to a head other than the one asked for, `initialised` paths of
    our leaves that this one has and the file has not.
    """

    leaves: Mapping[str, list[Piece]]
    stored: Mapping[str, str]  # the entries' names to the file's
    left_out: tuple[str, ...]
    initialised: tuple[str, ...]

    def reader(self, files: TensorFiles) -> Callable[[str, Index], np.ndarray]:
        """The function that reads a part of a tensor under the entries' name."""
        return lambda name, index: files.read(self.stored[name], index)


def stored_names(files: TensorFiles, family: Family, entries: Iterable[Entry]) -> dict[str, str]:
    """Names as entries have them to names as the file has them; buffers are left away."""
    known = {name for entry in entries for name in (entry.theirs, *entry.also)}
    names: dict[str, str] = {}
    for stored in files.names:
        name = stored
        for pattern, replacement in family.renamed:
            name = re.sub(pattern, replacement, name)
        if any(re.search(pattern, name) for pattern in family.buffers):
            continue
        full = (candidate for candidate in (name, *(p + name for p in family.prefixes)) if candidate in known)
        name = next(full, name)
        if name in names:
            raise InputError(
                f"{files.folder} holds both {names[name]} and {stored}, which are one tensor here"
            )
        names[name] = stored
    return names


def match(
    files: TensorFiles,
    family: Family,
    leaves: Mapping[str, list[Piece]],
    own: Iterable[Entry],
    abstract: Leaves,
    fixed: Collection[str],
) -> Matched:
    """Match a file's tensors with the leaves of a model.

    `leaves` are the pieces of the model with the head that is asked for, `own` the entries with the head of
    the file's architecture, `fixed` those leaves that the file must have, whatever the head. Raises
    `InputError` that lists missing and unknown tensors, wrong shapes and types.
    """
    wanted = [piece.entry for pieces in leaves.values() for piece in pieces]
    expected = [*wanted, *own]
    stored = stored_names(files, family, expected)
    shapes = {name: files.shape(kept) for name, kept in stored.items()}
    initialised = tuple(
        path
        for path, leaf in abstract.items()
        if path not in fixed and not _all_there(leaves.get(path, []), leaf, shapes)
    )
    used = {path: leaves.get(path, []) for path in abstract if path not in initialised}
    names = {name for pieces in used.values() for piece in pieces for name in _names(piece.entry)}
    over = [name for name in stored if name not in names]
    extra = {name for name in over if any(re.search(pattern, name) for pattern in family.extras)}
    known = {name for entry in expected for name in _names(entry)} | extra
    problems = {
        "missing tensors": _missing(used, stored),
        "unknown tensors": [stored[name] for name in over if name not in known],
        "wrong shapes": _wrong_shapes(used, abstract, shapes),
        "types that are not floating-point": _wrong_types(
            files, [stored[name] for name in names & set(stored)]
        ),
    }
    if any(problems.values()):
        text = "; ".join(f"{kind}: {listed(found)}" for kind, found in problems.items() if found)
        raise InputError(f"{files.folder} does not fit its config.json ({family.name}): {text}")
    _check_copies(used, files, stored)
    _check_repeated(used, abstract, files, stored)
    used = {path: [piece for piece in pieces if not piece.entry.again] for path, pieces in used.items()}
    return Matched(used, stored, tuple(stored[name] for name in over), initialised)


def _names(entry: Entry) -> tuple[str, ...]:
    return (entry.theirs, *entry.also)


def _all_there(pieces: Sequence[Piece], leaf: jax.ShapeDtypeStruct, shapes: Mapping[str, Shape]) -> bool:
    """Whether the file has all of a leaf, in the leaf's shape."""
    needed = [piece for piece in pieces if not piece.entry.again]
    fits = [shapes.get(piece.entry.theirs) == piece.shape(tuple(leaf.shape)) for piece in needed]
    return bool(fits) and all(fits)


def _missing(used: Mapping[str, list[Piece]], stored: Mapping[str, str]) -> list[str]:
    bare = [f"(any tensor for {path})" for path, pieces in used.items() if not pieces]
    named = [p.entry.theirs for pieces in used.values() for p in pieces if not p.entry.again]
    return bare + sorted({name for name in named if name not in stored})


def _wrong_shapes(
    used: Mapping[str, list[Piece]], abstract: Leaves, shapes: Mapping[str, Shape]
) -> list[str]:
    found = {}
    for path, pieces in used.items():
        for piece in pieces:
            name, valid = piece.entry.theirs, piece.shape(tuple(abstract[path].shape))
            if name in shapes and shapes[name] != valid:
                found[name] = f"{name} {list(shapes[name])} (valid: {list(valid)})"
    return [found[name] for name in sorted(found)]


def _wrong_types(files: TensorFiles, names: Iterable[str]) -> list[str]:
    types = {name: files.dtype(name).name for name in names}
    return [f"{name} {kind}" for name, kind in sorted(types.items()) if kind not in FLOATING]


def _check_copies(used: Mapping[str, list[Piece]], files: TensorFiles, stored: Mapping[str, str]) -> None:
    """Raise `InputError` where a tensor that the configuration ties to another is there with other values."""
    for pieces in used.values():
        for name, copy in ((p.entry.theirs, copy) for p in pieces for copy in p.entry.also):
            if copy in stored and not _equal(files, stored[name], stored[copy]):
                raise InputError(
                    f"{files.folder}: {copy} differs from {name}, which config.json ties it to; "
                    f"set tie_word_embeddings to false there"
                )


def _check_repeated(
    used: Mapping[str, list[Piece]], abstract: Leaves, files: TensorFiles, stored: Mapping[str, str]
) -> None:
    """Raise `InputError` where a tensor that repeats part of a leaf has other values than this."""

    def read(name: str, index: Index) -> np.ndarray:
        return files.read(stored[name], index)

    for path, pieces in used.items():
        again = [piece for piece in pieces if piece.entry.again and piece.entry.theirs in stored]
        first = [piece for piece in pieces if not piece.entry.again]
        shape = tuple(abstract[path].shape)
        for piece, index in ((one, index) for one in again for index in _by_rows(one, shape)):
            one, two = (leaf_block(p, shape, index, np.dtype(np.float32), read) for p in ([piece], first))
            if not np.array_equal(one, two):
                raise InputError(
                    f"{files.folder}: {piece.entry.theirs} differs from {first[0].entry.theirs}, which "
                    f"config.json ties it to; set tie_word_embeddings to false there"
                )


def _by_rows(piece: Piece, shape: Shape, rows: int = 1024) -> Iterator[Index]:
    """What a piece fills of a plain leaf, a few rows at a time."""
    for start in range(0, shape[0], rows):
        window = (slice(start, min(start + rows, shape[0])), *(slice(0, n) for n in shape[1:]))
        for _, box in piece.boxes(shape, window):
            yield box.our_index((0,) * len(shape))


def _equal(files: TensorFiles, first: str, second: str, rows: int = 1024) -> bool:
    """Whether two tensors are equal, compared a few rows at a time."""
    if files.shape(first) != files.shape(second):
        return False
    one, two = files.read(first), files.read(second)
    starts = range(0, len(one), rows)
    return all(np.array_equal(one[start : start + rows], two[start : start + rows]) for start in starts)
