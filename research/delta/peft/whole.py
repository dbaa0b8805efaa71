"""`modules_to_save`: modules of the base model that are stored in full, a classifier above all."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from .... import InputError
from ....models.pretrained.assemble import their_tensors
from ....models.pretrained.mapping import Entry, Piece, place
from .files import Tensors
from .modules import Base


def read_whole(saved: Mapping[str, np.ndarray], base: Base) -> dict[str, np.ndarray]:
    """Our arrays, by path, from tensors of the base model; what no tensor fills stays as it is.

    Raises `InputError` for a tensor of another shape (a resized vocabulary) and for one of a tied pair, which
    PEFT unties.
    """
    flat = flatten_dict(dict(base.params), sep="/")
    chosen = [entry for name in saved for entry in base.entries[name]]
    _check_tied(chosen, base)
    values = {entry.theirs: saved[name] for name in saved for entry in base.entries[name]}
    return {
        path: _leaf(np.asarray(flat[path]), pieces, values)
        for path, pieces in place(chosen, base.model.config).items()
    }


def _leaf(kept: np.ndarray, pieces: Sequence[Piece], values: Mapping[str, np.ndarray]) -> np.ndarray:
    filled = kept.astype(values[pieces[0].entry.theirs].dtype)
    for piece in pieces:
        tensor, expected = values[piece.entry.theirs], piece.shape(kept.shape)
        if tensor.shape != expected:
            raise InputError(
                f"tensor {piece.entry.theirs!r} has shape {list(tensor.shape)}, the base model's has "
                f"{list(expected)}"
            )
        for row, box in piece.boxes(kept.shape):
            part = tensor[box.their_index()]
            into = filled if row is None else filled[row]
            into[box.our_index()] = part.T if box.transposed else part
    return filled


def write_whole(paths: Collection[str], params: Mapping[str, Any], base: Base) -> tuple[list[str], Tensors]:
    """The modules of theirs that hold our arrays at `paths`, and their tensors, made of `params`."""
    shown = {entry.theirs: name for name, group in base.entries.items() for entry in group}
    pieces = place([entry for group in base.entries.values() for entry in group], base.model.config)
    names = set()
    for path in paths:
        if path not in pieces:
            raise InputError(f"{path}: {base.architecture} has no tensor for this array to be saved in")
        _check_tied([piece.entry for piece in pieces[path]], base)
        names |= {shown[piece.entry.theirs].rpartition(".")[0] for piece in pieces[path]}
    tensors = {
        shown[tensor.name]: tensor.make()
        for tensor in their_tensors(pieces, params)
        if any(shown[tensor.name].startswith(f"{name}.") for name in names)
    }
    return sorted(names), tensors


def _check_tied(entries: Collection[Entry], base: Base) -> None:
    for entry in entries:
        if entry.also or entry.again:
            raise InputError(
                f"{entry.theirs} is tied to another tensor of {base.architecture}, and PEFT's "
                f"modules_to_save unties them, which the model here cannot express"
            )
