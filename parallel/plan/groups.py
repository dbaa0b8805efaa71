"""Collectives of a compiled program: which devices take part, over which mesh axes, and bytes each sends."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from .hlo import Instruction

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
LISTED = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? \{([^}]*)\}")
AXIS = re.compile(r"'?([\w.]+)'?=(\d+)")
PART = re.compile(r"'?([\w.]+)'?(?::\((\d+)\)(\d+))?")
PAIRS = re.compile(r"source_target_pairs=\{([\d,{} ]*)\}")


class Collective(NamedTuple):
    """One collective, as often as it runs: its kind, mesh axes, group size, and bytes a device sends each
    time.

    `background`: computed beside other work from a start to a done.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    bytes: float
    times: int
    background: bool = False

    @property
    def total(self) -> float:
        """Bytes that a device sends in all."""
        return self.bytes * self.times


def collective_kind(instruction: Instruction) -> str | None:
    """The kind of a collective or of its start; None for anything else, a collective's done among it."""
    base = instruction.opcode.removesuffix("-start")
    return base if base in KINDS else None


def collective(
    instruction: Instruction,
    kind: str,
    size: float,
    times: int,
    mesh: Mapping[str, int],
    background: bool = False,
) -> Collective | None:
    """What an instruction sends, given the bytes of the whole array (gathered, reduced or moved) on a device;
    None where its groups have one device each.

    A ring's n - 1 of n parts are sent, for a sum twice.
    """
    group, axes = members(instruction, mesh)
    if kind == "collective-permute":
        return Collective(kind, axes, group, size, times, background) if axes else None
    if group < 2:
        return None
    share = (group - 1) / group * (2 if kind == "all-reduce" else 1)
    return Collective(kind, axes, group, size * share, times, background)


def members(instruction: Instruction, mesh: Mapping[str, int]) -> tuple[int, tuple[str, ...]]:
    """How many devices a group has, and the mesh axes along which they lie."""
    text, devices = instruction.text, math.prod(mesh.values())
    if pairs := PAIRS.search(text):
        moved = [pair.split(",") for pair in re.findall(r"\{([\d, ]+)\}", pairs[1])]
        ids = [(int(source), int(target)) for source, target in moved if int(source) != int(target)]
        return 2, tuple(axis for axis in mesh if any(axis in axes_of(pair, mesh) for pair in ids))
    groups = _groups(text, devices)
    if groups is None:
        return devices, tuple(axis for axis, size in mesh.items() if size > 1)
    return groups.shape[1], axes_of(groups[0], mesh)


def axes_of(ids: np.ndarray | tuple[int, ...], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which devices differ, numbered in the mesh's order."""
    places = np.unravel_index(np.asarray(ids), tuple(mesh.values()))
    return tuple(axis for axis, along in zip(mesh, places) if len(set(along.tolist())) > 1)


def _groups(text: str, devices: int) -> np.ndarray | None:
    """Groups as rows of device numbers; None where all devices are one group."""
    if found := IOTA.search(text):
        shape, dims, order = (tuple(map(int, part.split(","))) if part else () for part in found.groups())
        return _iota(dims, order).reshape(shape)
    if found := LISTED.search(text):
        return np.array([[int(number) for number in row.split(",")] for row in _rows(found[1])])
    if found := NAMED.search(text):
        return _named(found[1], found[2], found[3])
    return None


def _rows(text: str) -> list[str]:
    return re.findall(r"\{([\d, ]+)\}", text)


def _iota(dims: tuple[int, ...], order: tuple[int, ...]) -> np.ndarray:
    numbers = np.arange(math.prod(dims)).reshape(dims)
    return numbers.transpose(order) if order else numbers


def _named(axes: str, order: str | None, chosen: str) -> np.ndarray:
    """Groups along named axes of a mesh of XLA's own, or along parts of them, `axis:(before)size`."""
    sizes = {name: int(size) for name, size in AXIS.findall(axes)}
    numbers = np.arange(math.prod(sizes.values()))
    if order:
        dims, _, permuted = order.partition("T(")
        numbers = _iota(
            tuple(map(int, re.findall(r"\d+", dims))), tuple(map(int, re.findall(r"\d+", permuted)))
        ).reshape(-1)
    taken, split = [], list[int]()
    wanted = {
        name: (int(before or 1), int(size or sizes[name])) for name, before, size in PART.findall(chosen)
    }
    for name, size in sizes.items():
        before, part = wanted.get(name, (1, 1))
        split += [before, part, size // before // part]
        taken.append(len(split) - 2)
    grid = np.moveaxis(numbers.reshape(split), taken, range(-len(taken), 0))
    return grid.reshape(-1, math.prod(split[place] for place in taken))
