"""Which part of which published tensor is which part of our parameters.

A family lists `Entry`s: their tensor's name, the `/` path of our leaf, and a form. A form says how boxes of
our leaf lie in their tensor. Loading, saving and the mapping of gradients all read this one description, so
they cannot disagree.

    Entry("h.3.attn.c_attn.weight", "layers_3/attention/key/kernel", Part(1, 3, axis=1))
    Entry("model.embed_tokens.weight", "embedding/table", Rows(0, config.vocab))
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from .. import TransformerConfig

Shape = tuple[int, ...]
Index = tuple[slice, ...]  # one slice an axis, with start and stop and without a step


@dataclass(frozen=True)
class Box:
    """`size` entries of our leaf from `ours` on are those of their tensor from `theirs` on.

    All three have one number for each of our axes, in our order; `transposed`: their axes are ours reversed.
    """

    ours: Shape
    theirs: Shape
    size: Shape
    transposed: bool = False

    def clip(self, index: Index) -> Box | None:
        """The part of the box inside `index` of our leaf; None where there is none."""
        start = [max(own, window.start) for own, window in zip(self.ours, index)]
        stop = [min(own + n, window.stop) for own, n, window in zip(self.ours, self.size, index)]
        if any(low >= high for low, high in zip(start, stop)):
            return None
        moved = tuple(there + low - own for there, low, own in zip(self.theirs, start, self.ours))
        return Box(tuple(start), moved, tuple(h - low for low, h in zip(start, stop)), self.transposed)

    def our_index(self, origin: Sequence[int] = ()) -> Index:
        """Where the box lies in our leaf, or in an array that begins at `origin` of it."""
        begin = [own - start for own, start in zip(self.ours, origin or [0] * len(self.ours))]
        return tuple(slice(low, low + n) for low, n in zip(begin, self.size))

    def their_index(self) -> Index:
        """Where the box lies in their tensor, with their order of axes."""
        index = tuple(slice(low, low + n) for low, n in zip(self.theirs, self.size))
        return index[::-1] if self.transposed else index


class Form(Protocol):
    """How our leaf, of shape `ours`, and one of their tensors correspond."""

    def shape(self, ours: Shape) -> Shape:
        """The shape that their tensor has to have."""

    def boxes(self, ours: Shape) -> Iterator[Box]:
        """Boxes of our leaf and where they lie in their tensor."""


@dataclass(frozen=True)
class Same:
    """Their tensor is our leaf."""

    def shape(self, ours: Shape) -> Shape:
        """Ours."""
        return ours

    def boxes(self, ours: Shape) -> Iterator[Box]:
        """One, the whole."""
        yield Box((0,) * len(ours), (0,) * len(ours), ours)


@dataclass(frozen=True)
class Transposed:
    """Their tensor is our leaf with its axes reversed: PyTorch's `Linear.weight` is `[out, in]`."""

    def shape(self, ours: Shape) -> Shape:
        """Ours, reversed."""
        return ours[::-1]

    def boxes(self, ours: Shape) -> Iterator[Box]:
        """One, the whole."""
        yield Box((0,) * len(ours), (0,) * len(ours), ours, transposed=True)


@dataclass(frozen=True)
class Part:
    """Our leaf is part `index` of `count` equal parts of their tensor along their `axis`.

    `transposed`: the part's axes are ours reversed (a fused `Linear.weight` `[3 out, in]` has axis 0).
    """

    index: int
    count: int
    axis: int = 0
    transposed: bool = False

    def shape(self, ours: Shape) -> Shape:
        """The part's, `count` times as long along `axis`."""
        part = list(ours[::-1] if self.transposed else ours)
        part[self.axis] *= self.count
        return tuple(part)

    def boxes(self, ours: Shape) -> Iterator[Box]:
        """One, the whole leaf."""
        axis = len(ours) - 1 - self.axis if self.transposed else self.axis
        theirs = [0] * len(ours)
        theirs[axis] = self.index * ours[axis]
        yield Box((0,) * len(ours), tuple(theirs), ours, self.transposed)


@dataclass(frozen=True)
class InterleavedHeads:
    """Their axis 0 is `[heads, count, K]`, flattened; our leaf has number `index` of `count` of every head.

    So ChatGLM and GPT-NeoX fuse queries, keys and values. `transposed` as in `Part`.
    """

    index: int
    heads: int
    count: int = 3
    transposed: bool = False

    def shape(self, ours: Shape) -> Shape:
        """The shape of `count` leaves side by side."""
        return Part(self.index, self.count, 0, self.transposed).shape(ours)

    def boxes(self, ours: Shape) -> Iterator[Box]:
        """One a head."""
        axis = len(ours) - 1 if self.transposed else 0
        width = ours[axis] // self.heads
        for head in range(self.heads):
            own, there, size = [0] * len(ours), [0] * len(ours), list(ours)
            own[axis], size[axis] = head * width, width
            there[axis] = (head * self.count + self.index) * width
            yield Box(tuple(own), tuple(there), tuple(size), self.transposed)


@dataclass(frozen=True)
class Rows:
    """`start:stop` along our `axis` are a leaf of form `of`; what no entry of the leaf names is padding, 0.

    For a padded vocabulary, and for a leaf whose rows lie in several of their tensors (an entry for each).
    """

    start: int
    stop: int
    axis: int = 0
    of: Form = Same()

    def shape(self, ours: Shape) -> Shape:
        """That of the rows alone."""
        return self.of.shape(self._rows(ours))

    def boxes(self, ours: Shape) -> Iterator[Box]:
        """Those of the rows alone, further along our leaf."""
        for box in self.of.boxes(self._rows(ours)):
            own = tuple(n + self.start * (axis == self.axis) for axis, n in enumerate(box.ours))
            yield Box(own, box.theirs, box.size, box.transposed)

    def _rows(self, ours: Shape) -> Shape:
        return tuple(self.stop - self.start if axis == self.axis else n for axis, n in enumerate(ours))


@dataclass(frozen=True)
class Entry:
    """Their tensor `theirs` holds our leaf `ours` (paths of unrolled layers: `layers_3/...`), in `form`.

    `also` are further names under which a file may hold the same tensor again (tied weights): accepted if
    equal, never written. `again` is for a tensor that repeats part of a leaf which other entries fill (a head
    tied to some rows of a table): it may be absent, must be equal, and is written.
    """

    theirs: str
    ours: str
    form: Form = Same()
    also: tuple[str, ...] = ()
    again: bool = False


def linear(theirs: str, ours: str, bias: bool = True) -> Iterator[Entry]:
    """The entries of a PyTorch `Linear` called `theirs` and our dense layer `ours`."""
    yield Entry(f"{theirs}.weight", f"{ours}/kernel", Transposed())
    if bias:
        yield Entry(f"{theirs}.bias", f"{ours}/bias")


def norm(theirs: str, ours: str, bias: bool = True) -> Iterator[Entry]:
    """The entries of a PyTorch norm (`weight` and, where it has one, `bias`) and ours (`scale`, `bias`)."""
    yield Entry(f"{theirs}.weight", f"{ours}/scale")
    if bias:
        yield Entry(f"{theirs}.bias", f"{ours}/bias")


@dataclass(frozen=True)
class Piece:
    """An entry at its place in a parameter tree: in row `row` of a stacked leaf, or (None) in a plain one."""

    entry: Entry
    row: int | None = None

    def shape(self, leaf: Shape) -> Shape:
        """The shape that their tensor has to have, for a leaf of shape `leaf`."""
        return self.entry.form.shape(leaf if self.row is None else leaf[1:])

    def boxes(self, leaf: Shape, index: Index | None = None) -> Iterator[tuple[int | None, Box]]:
        """(row, box within the row or the plain leaf), clipped to `index` of the leaf."""
        window = tuple(slice(0, n) for n in leaf) if index is None else index
        if self.row is not None:
            if not window[0].start <= self.row < window[0].stop:
                return
            leaf, window = leaf[1:], window[1:]
        for box in self.entry.form.boxes(leaf):
            clipped = box.clip(window)
            if clipped is not None:
                yield self.row, clipped


def place(entries: Iterable[Entry], config: TransformerConfig) -> dict[str, list[Piece]]:
    """Our leaves' paths, scanned where the configuration is, and the pieces that fill each."""
    leaves: dict[str, list[Piece]] = {}
    for entry in entries:
        path, row = scanned_path(entry.ours, config) if config.scan else (entry.ours, None)
        leaves.setdefault(path, []).append(Piece(entry, row))
    return leaves


def scanned_path(path: str, config: TransformerConfig) -> tuple[str, int | None]:
    """Path and row of the scanned leaf that holds an unrolled one (see `modicum.models.stacking`)."""
    found = re.search(r"(^|/)layers_(\d+)/", path)
    if found is None:
        return path, None
    row, layer = divmod(int(found[2]), config.period)
    stack = "layers" if config.period == 1 else f"layers/layer_{layer}"
    return f"{path[: found.start()]}{found[1]}{stack}/{path[found.end() :]}", row
