"""Bytes that an instruction of a compiled program reads and writes in the device's and the host's memory."""

from __future__ import annotations

from collections.abc import Iterable

from .hlo import HOST, Array, Computation, Instruction

SLICES = ("dynamic-slice", "slice", "gather")


def moved_bytes(one: Instruction, here: Computation, inner: Computation | None) -> tuple[float, float]:
    """Bytes read and written in the large memory, and bytes that lie in the host's."""
    if one.opcode in SLICES:
        return _either_end(one.arrays, here.arrays(one.operands[0]), one.arrays)
    if one.opcode in ("dynamic-update-slice", "scatter"):
        update = here.arrays(one.operands[1 if one.opcode == "dynamic-update-slice" else -1])
        return _either_end(update, update, one.arrays)
    if one.opcode == "copy-start":
        return _either_end(one.arrays[:1], one.arrays[:1], one.arrays[1:2])
    if one.opcode == "slice-start":
        return _either_end(one.arrays[1:2], here.arrays(one.operands[0]), one.arrays[1:2])
    given = [array for name in one.operands for array in here.arrays(name)]
    arrays = [*_read(one, here, inner), *_written(one, inner)] if inner else [*given, *one.arrays]
    return _device(arrays), _host(arrays)


def _read(one: Instruction, here: Computation, inner: Computation) -> list[Array]:
    """What a fusion reads of each operand: slices where it only slices it, nothing where it updates it."""
    arrays: list[Array] = []
    parameters = {each.given: each.name for each in inner.instructions if each.opcode == "parameter"}
    for place, name in enumerate(one.operands):
        given, own = here.arrays(name), parameters.get(str(place), "")
        uses = [each for each in inner.instructions if own in each.operands]
        if uses and all(_slices(each, own) for each in uses):
            kept = [array for each in uses if each.opcode in SLICES for array in each.arrays]
            spaces = {array.space for array in given} or {0}
            arrays += [Array(array.dtype, array.sizes, min(spaces)) for array in kept]
        else:
            arrays += given
    return arrays


def _slices(use: Instruction, own: str) -> bool:
    """Whether an instruction takes a slice of the array, or updates it in place."""
    first = bool(use.operands) and use.operands[0] == own
    return first and use.opcode in (*SLICES, "dynamic-update-slice")


def _written(one: Instruction, inner: Computation) -> list[Array]:
    """What a fusion writes: of an array updated in place only the update."""
    names = inner.root.operands if inner.root.opcode == "tuple" else (inner.root.name,)
    arrays: list[Array] = []
    for array, name in zip(one.arrays, names):
        made = inner.source(name)
        updates = made is not None and made.opcode == "dynamic-update-slice"
        update = inner.arrays(made.operands[1]) if updates and made is not None else ()
        arrays += [Array(each.dtype, each.sizes, array.space) for each in update] or [array]
    return arrays


def _device(arrays: Iterable[Array]) -> float:
    return sum(array.bytes for array in arrays if array.space == 0)


def _host(arrays: Iterable[Array]) -> float:
    return sum(array.bytes for array in arrays if array.space == HOST)


def _either_end(
    moved: Iterable[Array], source: Iterable[Array], target: Iterable[Array]
) -> tuple[float, float]:
    """Bytes of what is moved, once for each end in the device's memory, and once where one is the host's."""
    size = sum(array.bytes for array in moved)
    ends = [{array.space for array in end} for end in (source, target)]
    return size * sum(0 in end for end in ends), size * any(HOST in end for end in ends)
