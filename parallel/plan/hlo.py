"""A compiled program's text (HLO) as computations of instructions, with how often each loop goes round.

XLA prints one instruction a line: `%name = shape opcode(%operands), attributes`. A shape is a type, sizes and
a layout whose `S(n)` is the memory it lies in: none or 0 the device's large memory, 1 its on-chip memory
(TPU), 5 the host's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ... import InputError

ON_CHIP, HOST = 1, 5
BITS = {"pred": 8, "token": 0, "opaque": 0}
COMMENT = re.compile(r"/\*.*?\*/")
ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](\{[^}]*\})?")
SPACE = re.compile(r"S\((\d+)\)")
NAME = re.compile(r"%([\w.\-]+)")
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
ASSIGNMENT = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclass(frozen=True)
class Array:
    """One array of a shape: type, sizes, and the memory it lies in."""

    dtype: str
    sizes: tuple[int, ...]
    space: int = 0

    @property
    def count(self) -> int:
        """Numbers in it."""
        return math.prod(self.sizes)

    @property
    def bytes(self) -> float:
        """Bytes without the layout's padding."""
        bits = BITS.get(self.dtype) if self.dtype in BITS else int(re.sub(r"^\D+|\D.*$", "", self.dtype))
        return self.count * (bits or 0) / 8


@dataclass(frozen=True)
class Instruction:
    """One line: its arrays (several for a tuple), what it does, to what, and the rest of the line."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    text: str = field(repr=False)
    given: str = field(default="", repr=False)

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute such as `body` names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.text)
        return found[1] if found else None

    @property
    def branches(self) -> tuple[str, ...]:
        """The computations of a conditional."""
        found = re.search(r"branch_computations=\{([^}]*)\}", self.text)
        if found:
            return tuple(NAME.findall(found[1]))
        both = self.called("true_computation"), self.called("false_computation")
        return tuple(name for name in both if name)

    def sizes(self, attribute: str) -> tuple[int, ...]:
        """Whole numbers of an attribute such as `lhs_contracting_dims={1}`."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.text)
        return tuple(int(part) for part in found[1].split(",") if part) if found else ()


@dataclass(frozen=True)
class Computation:
    """Instructions in the order of the text; the last line marked ROOT is what it returns."""

    name: str
    instructions: tuple[Instruction, ...]
    root: Instruction

    @cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        """Instructions by name."""
        return {one.name: one for one in self.instructions}

    def arrays(self, name: str) -> tuple[Array, ...]:
        """What an operand is; nothing where it is not here."""
        one = self.by_name.get(name)
        return one.arrays if one else ()

    def source(self, name: str) -> Instruction | None:
        """The instruction behind copies, which change no value."""
        one = self.by_name.get(name)
        while one is not None and one.opcode in ("copy", "bitcast") and one.operands:
            one = self.by_name.get(one.operands[0])
        return one


@dataclass(frozen=True)
class Program:
    """A module: its computations by name, and where it starts."""

    computations: Mapping[str, Computation]
    entry: Computation

    @classmethod
    def parse(cls, text: str) -> Program:
        """Read `compiled.as_text()`; raises InputError where it is no HLO module."""
        found, entry = {}, None
        for name, starts, lines in _blocks(text):
            instructions, root = [], None
            for line in lines:
                one, is_root = parse_instruction(line)
                instructions.append(one)
                root = one if is_root or root is None else root
            if root is None:
                continue
            found[name] = Computation(name, tuple(instructions), root)
            entry = found[name] if starts else entry
        if entry is None:
            raise InputError("this text is no HLO module: it has no line that starts with ENTRY")
        return cls(found, entry)

    def trips(self, loop: Instruction, caller: Computation) -> int | None:
        """How often a loop goes round; None where the text does not say.

        XLA's note, or else the bound of a counter that starts at a constant and grows by a constant.
        """
        noted = KNOWN_TRIPS.search(loop.text)
        if noted:
            return int(noted[1])
        condition, body = (self.computations[loop.called(part) or ""] for part in ("condition", "body"))
        test = condition.root
        if test.opcode != "compare" or len(test.operands) != 2:
            return None
        counter, bound = condition.source(test.operands[0]), _constant(condition.source(test.operands[1]))
        index = None if counter is None else re.search(r"index=(\d+)", counter.text)
        if bound is None or index is None:
            return None
        place = int(index[1])
        start, step = _initial(loop, caller, place), _step(body, place)
        if start is None or not step:
            return None
        last = {"LT": bound, "LE": bound + 1, "GT": bound, "GE": bound - 1, "NE": bound}
        direction = re.search(r"direction=(\w+)", test.text)
        end = last.get(direction[1]) if direction else None
        return None if end is None else max(0, -((start - end) // step))


def parse_instruction(line: str) -> tuple[Instruction, bool]:
    """An instruction and whether it is its computation's root."""
    match = ASSIGNMENT.match(line)
    if match is None:
        raise InputError(f"this line is no HLO instruction: {line.strip()[:80]!r}")
    rest = match[3]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    given = rest[opening + 1 : closing]
    instruction = Instruction(
        match[2], tuple(_arrays(shape)), rest[:opening], tuple(NAME.findall(given)), rest[closing:], given
    )
    return instruction, bool(match[1])


def _blocks(text: str) -> Iterator[tuple[str, bool, list[str]]]:
    """(name, whether it is the entry, lines) of every computation."""
    name, starts, lines = "", False, list[str]()
    for raw in text.splitlines():
        line = COMMENT.sub("", raw)
        header = None if line.startswith((" ", "HloModule")) else HEADER.match(line)
        if header:
            name, starts, lines = header[2], bool(header[1]), []
        elif line.startswith("}") and name:
            yield name, starts, lines
            name = ""
        elif name and " = " in line:
            lines.append(line)


def _arrays(shape: str) -> Iterator[Array]:
    for dtype, sizes, layout in ARRAY.findall(shape):
        space = SPACE.search(layout or "")
        yield Array(
            dtype, tuple(int(size) for size in sizes.split(",") if size), int(space[1]) if space else 0
        )


def _closing(text: str, opening: int) -> int:
    """Where the bracket at `opening` closes."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise InputError(f"this HLO line ends inside brackets: {text[:80]!r}")


def _constant(one: Instruction | None) -> int | None:
    if one is None or one.opcode != "constant" or not re.fullmatch(r"-?\d+", one.given):
        return None
    return int(one.given)


def _initial(loop: Instruction, caller: Computation, place: int) -> int | None:
    """The counter's first value; XLA starts those it has widened or made itself at 0."""
    start = caller.source(loop.operands[0])
    if start is None or start.opcode != "tuple":
        return 0
    return _constant(caller.source(start.operands[place]))


def _step(body: Computation, place: int) -> int | None:
    """What the counter grows by."""
    if body.root.opcode != "tuple":
        return None
    added = body.source(body.root.operands[place])
    if added is None or added.opcode != "add":
        return None
    steps = [_constant(body.source(name)) for name in added.operands]
    return next((step for step in steps if step is not None), None)
