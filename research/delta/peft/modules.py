"""The modules of the published model and ours: read from the family's list of tensors.

A `Linear.weight` of theirs holds one of our kernels, or several side by side (GPT-2's `c_attn`). Everything
an adapter file says of a module (names, which axis is the output, which outputs are whose) follows from the
entries that load the model itself.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from .... import InputError
from ....models.heads import LanguageModelHead
from ....models.pretrained.family import Family
from ....models.pretrained.mapping import Entry, Form, scanned_path
from ....models.transformer import Transformer

KERNEL = "/kernel"
WEIGHT = ".weight"
QUERY = "/query"


@dataclass(frozen=True, eq=False)
class Part:
    """One of our modules in one of theirs: `columns` are the outputs of theirs that are ours, in our order.

    `path` is ours with layers unrolled, `stacked` and `row` are where it lies in the parameter tree. A padded
    vocabulary has outputs that are nobody's: `columns` is -1 there.
    """

    path: str
    stacked: str
    row: int | None
    columns: np.ndarray


@dataclass(frozen=True)
class Module:
    """A `Linear` of theirs, from `inputs` to `outputs` features, and our modules that make it up.

    `fan_in_fan_out`: its weight is `[in, out]`, as GPT-2's `Conv1D` has it.
    """

    name: str
    inputs: int
    outputs: int
    fan_in_fan_out: bool
    parts: tuple[Part, ...]

    @property
    def fused(self) -> bool:
        """Whether several of our modules are one of theirs."""
        return len(self.parts) > 1


@dataclass(frozen=True)
class Base:
    """A loaded published model as adapters see it.

    `modules` are by their names, `entries` all tensors' by theirs, as the architecture has them. `mixed` are
    modules of theirs whose product is inside one of ours that does more (a pooler): our path by their name.
    """

    family: Family
    architecture: str
    model: Transformer
    params: Mapping[str, Any]
    entries: Mapping[str, list[Entry]]
    modules: Mapping[str, Module]
    mixed: Mapping[str, str]

    @property
    def sites(self) -> dict[str, tuple[str, int | None]]:
        """Where modules of ours lie, by unrolled paths: all that are theirs too, attention, and the root."""
        found: dict[str, tuple[str, int | None]] = {"": ("", None)}
        for module in self.modules.values():
            for part in module.parts:
                found[part.path] = part.stacked, part.row
                if part.path.endswith(QUERY):
                    found[part.path.removesuffix(QUERY)] = part.stacked.removesuffix(QUERY), part.row
        return found

    def named(self, name: str, known: Container[str]) -> str:
        """A file's name of a module or tensor as the architecture has it, if `known` holds it there.

        Adapters of a bare model lack the beginning (`transformer.`) that those of a model with a head have.
        """
        prefixes = self.family.prefixes
        ways = (name, *(p + name for p in prefixes), *(name.removeprefix(p) for p in prefixes))
        return next((way for way in ways if way in known), name)


def base_of(family: Family, architecture: str, model: Transformer, params: Mapping[str, Any]) -> Base:
    """The base model's tensors and modules; raises `InputError` where the parameters are not the model's."""
    flat = flatten_dict(dict(params), sep="/")
    entries: dict[str, list[Entry]] = {}
    for entry in family.entries(model.config, model.head):
        entries.setdefault(_shown(family, architecture, entry.theirs), []).append(entry)
    modules, mixed = {}, {}
    for theirs, group in entries.items():
        if theirs.endswith(WEIGHT) and all(_matrix(entry) for entry in group):
            name, path = theirs.removesuffix(WEIGHT), group[0].ours.removesuffix(KERNEL)
            if _product(path, model):
                modules[name] = _module(name, group, model, flat)
            else:
                mixed[name] = path
    return Base(family, architecture, model, params, entries, modules, mixed)


def _product(path: str, model: Transformer) -> bool:
    """Whether our module at `path` maps its input by its kernel and does nothing else."""
    top, config = path.split("/")[0], model.config
    if path == "head":
        return isinstance(model.head, LanguageModelHead) and (config.logit_scale, config.embedding_width) == (
            1.0,
            0,
        )
    return top not in ("pooler", "classifier")


def _shown(family: Family, architecture: str, name: str) -> str:
    """The tensor's name in an architecture whose names lack the beginning."""
    prefix = next((p for p in family.prefixes if architecture in family.bare and name.startswith(p)), "")
    return name[len(prefix) :]


def _matrix(entry: Entry) -> bool:
    return entry.ours.endswith(KERNEL) and not entry.again


def _module(name: str, group: list[Entry], model: Transformer, flat: Mapping[str, Any]) -> Module:
    parts: list[Part] = []
    shape: tuple[int, ...] = (0, 0)
    transposed = False
    for entry in group:
        stacked, row = scanned_path(entry.ours, model.config) if model.config.scan else (entry.ours, None)
        if stacked not in flat:
            raise InputError(f"the parameters have no {stacked}, which is the model's {name}.weight")
        leaf = tuple(flat[stacked].shape)[0 if row is None else 1 :]
        columns, transposed = _columns(entry.form, leaf)
        shape = entry.form.shape(leaf)
        path, stacked = entry.ours.removesuffix(KERNEL), stacked.removesuffix(KERNEL)
        parts.append(Part(path, stacked, row, columns))
    inputs, outputs = shape[::-1] if transposed else shape
    return Module(name, inputs, outputs, not transposed, tuple(parts))


def _columns(form: Form, leaf: tuple[int, ...]) -> tuple[np.ndarray, bool]:
    """Which output of theirs each of ours is, and whether theirs come first in their weight."""
    columns, transposed = np.full(leaf[-1], -1), False
    for box in form.boxes(leaf):
        (own, there, size), transposed = (n[-1] for n in (box.ours, box.theirs, box.size)), box.transposed
        columns[own : own + size] = np.arange(there, there + size)
    return columns, transposed


def unrolled(base: Base, stacked: str, rows: tuple[int, ...] | None) -> Iterator[tuple[int, str]]:
    """(index among the rows, our unrolled path) of what a delta at `stacked` acts on."""
    for path, (place, row) in base.sites.items():
        if place == stacked and row is None:
            yield 0, path
        elif place == stacked and row is not None and (rows is None or row in rows):
            yield (row if rows is None else rows.index(row)), path
