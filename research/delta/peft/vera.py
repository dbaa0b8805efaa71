"""VeRA as PEFT stores it: `vera_lambda_d` `[r]` and `vera_lambda_b` `[out]` of each module, one A and B.

`vera_A` `[r, largest in]` and `vera_B` `[largest out, r]` are cut to each module's size. Matrices of
ours that are no cuts of one are stored side by side, with zeros in `vera_lambda_d` for what a module has not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .... import InputError
from ..methods import Method
from ..vera import VeRA
from .config import Config
from .files import PREFIX, ROOT, Tensors
from .lora import check_shape, columns_of
from .modules import Base, Module
from .places import Delta, Deltas

A, B = "vera_A", "vera_B"
D, LAMBDA_B = "vera_lambda_d", "vera_lambda_b"


class VeRACodec:
    """`peft_type: VERA`."""

    kind: ClassVar[str] = "VERA"
    methods: ClassVar[tuple[type[Method], ...]] = (VeRA,)
    suffixes: ClassVar[tuple[str, ...]] = (A, B, D, LAMBDA_B)

    def read(self, config: Config, found: Mapping[str, Tensors], base: Base) -> Deltas:
        """The deltas of our modules; raises `InputError` where the projections are not in the file."""
        rank, dropout = config.take("r", 256), float(config.take("vera_dropout", 0.0))
        method = VeRA(rank, dropout, float(config.take("d_initial", 0.1)))
        config.require("bias", "none")
        config.ignore("save_projection", "projection_prng_key")
        shared = found.get("", {})
        if A not in shared or B not in shared:
            raise InputError(
                f"{config.path.parent}: no {A} and {B}, which PyTorch's generator drew and nobody stored; "
                f"in PEFT, set save_projection=True and save it again"
            )
        deltas = Deltas()
        for name, tensors in found.items():
            if not name:
                continue
            module = base.modules[name]
            check_shape(name, D, tensors, (rank,))
            check_shape(name, LAMBDA_B, tensors, (module.outputs,))
            if not _holds(shared[A], rank, module.inputs) or not _holds(shared[B].T, rank, module.outputs):
                raise InputError(
                    f"{name}: {A} {list(shared[A].shape)} and {B} {list(shared[B].shape)} are too small for "
                    f"its {module.inputs}x{module.outputs} matrix and r={rank}"
                )
            a, b = shared[A][:, : module.inputs], shared[B][: module.outputs]
            for part in module.parts:
                values = {"a": a.T, "b": columns_of(b.T, part), "lambda_d": tensors[D]}
                deltas[part.path] = Delta(method, values | {"lambda_b": columns_of(tensors[LAMBDA_B], part)})
        return deltas

    def write(self, deltas: Deltas, base: Base) -> tuple[dict[str, Any], Tensors]:
        """The keys and tensors; raises `InputError` for several dropouts."""
        methods = [delta.method for delta in deltas.values() if isinstance(delta.method, VeRA)]
        if len({method.dropout for method in methods}) > 1:
            raise InputError("PEFT has one dropout in a VeRA adapter; save them apart")
        used = {
            name: own
            for name, module in base.modules.items()
            if (own := {part.path: deltas[part.path] for part in module.parts if part.path in deltas})
        }
        inputs = max(base.modules[name].inputs for name in used)
        outputs = max(base.modules[name].outputs for name in used)
        pairs: list[Pair] = []
        chosen = {name: _place(base.modules[name], own, pairs, inputs, outputs) for name, own in used.items()}
        tensors = {
            f"{ROOT}{A}": np.concatenate([pair.a for pair in pairs]),
            f"{ROOT}{B}": np.concatenate([pair.b for pair in pairs], 1),
        }
        for name, own in used.items():
            none = [np.zeros(len(pair.a), pair.a.dtype) for pair in pairs]
            inner = [chosen[name].get(index, zeros) for index, zeros in enumerate(none)]
            tensors[f"{PREFIX}{name}.{D}"] = np.concatenate(inner)
            tensors[f"{PREFIX}{name}.{LAMBDA_B}"] = _outer(base.modules[name], own)
        keys = {
            "r": sum(len(pair.a) for pair in pairs),
            "vera_dropout": methods[0].dropout,
            "d_initial": methods[0].initial,
            "save_projection": True,
            "target_modules": sorted(used),
            "fan_in_fan_out": any(base.modules[name].fan_in_fan_out for name in used),
        }
        return keys, tensors


@dataclass(frozen=True, eq=False)
class Pair:
    """One A `[r, in]` and B `[out, r]` in the making, and which of their columns and rows are fixed."""

    a: np.ndarray
    b: np.ndarray
    a_fixed: np.ndarray
    b_fixed: np.ndarray

    def fits(self, a: np.ndarray, rows: np.ndarray, b: np.ndarray) -> bool:
        """Whether A can begin with `a` and B have `b` in these rows."""
        if len(a) != len(self.a):
            return False
        head, same = self.a_fixed[: a.shape[1]], self.b_fixed[rows]
        return bool((self.a[:, : a.shape[1]] == a)[:, head].all() and (self.b[rows] == b)[same].all())

    def fix(self, a: np.ndarray, rows: np.ndarray, b: np.ndarray) -> None:
        """Make it so."""
        self.a[:, : a.shape[1]], self.a_fixed[: a.shape[1]] = a, True
        self.b[rows], self.b_fixed[rows] = b, True


def _place(
    module: Module, own: Mapping[str, Delta], pairs: list[Pair], inputs: int, outputs: int
) -> dict[int, np.ndarray]:
    """Find or make the pairs that hold the matrices of a module's parts; `lambda_d` by the pair's number.

    Parts of different `lambda_d` need pairs of their own, in which the others' rows are zero.
    """
    present = [part for part in module.parts if part.path in own]
    groups: dict[bytes, list[str]] = {}
    for path, delta in own.items():
        key = delta.variables["lambda_d"].tobytes() + delta.variables["a"].tobytes()
        groups.setdefault(key, []).append(path)
    chosen: dict[int, np.ndarray] = {}
    for members in groups.values():
        first = own[members[0]].variables
        a, rows, b = first["a"].T, [], []
        for part in present:
            real, mine = part.columns >= 0, own[part.path].variables["b"].T
            rows.append(part.columns[real])
            b.append((mine if part.path in members else np.zeros((len(mine), len(a)), a.dtype))[real])
        wanted = a, np.concatenate(rows), np.concatenate(b)
        free = (i for i, pair in enumerate(pairs) if i not in chosen and pair.fits(*wanted))
        index = next(free, len(pairs))
        if index == len(pairs):
            sizes = (len(a), inputs), (outputs, len(a))
            unset = np.full(inputs, False), np.full(outputs, False)
            pairs.append(Pair(np.zeros(sizes[0], a.dtype), np.zeros(sizes[1], a.dtype), *unset))
        pairs[index].fix(*wanted)
        chosen[index] = first["lambda_d"]
    return chosen


def _holds(projection: np.ndarray, rank: int, size: int) -> bool:
    """Whether `[rank, size]` can be cut from it."""
    return projection.ndim == 2 and len(projection) == rank and projection.shape[1] >= size


def _outer(module: Module, own: Mapping[str, Delta]) -> np.ndarray:
    values = np.zeros(module.outputs, next(iter(own.values())).variables["lambda_b"].dtype)
    for part in module.parts:
        if part.path in own:
            real = part.columns >= 0
            values[part.columns[real]] = own[part.path].variables["lambda_b"][real]
    return values
