"""AdaLoRA as PEFT stores it: `lora_A` `[r, in]`, `lora_E` `[r, 1]`, `lora_B` `[out, r]`.

All modules start with rank `init_r`, by which the product is divided; `rank_pattern` says which components
of a module are left, and the others are not stored. Here they are zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from .... import InputError
from ..adalora import AdaLoRA
from ..methods import Method
from .config import Config
from .files import PREFIX, Tensors
from .lora import check_shape, columns_of, tidy
from .modules import Base, Module
from .places import Delta, Deltas

A, E, B = "lora_A", "lora_E", "lora_B"
SMALL = 1e-5  # PEFT adds it to the rank
# The schedule of ranks; training goes on with one of its own.
SCHEDULE = ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "total_step", "r", "init_lora_weights")


class AdaLoRACodec:
    """`peft_type: ADALORA`."""

    kind: ClassVar[str] = "ADALORA"
    methods: ClassVar[tuple[type[Method], ...]] = (AdaLoRA,)
    suffixes: ClassVar[tuple[str, ...]] = (A, E, B)

    def read(self, config: Config, found: Mapping[str, Tensors], base: Base) -> Deltas:
        """The deltas of our modules, those of a fused one with the same A and E."""
        rank, alpha = config.take("init_r", 12), float(config.take("lora_alpha", 8.0))
        patterns = {
            name.removesuffix(f".{E}"): kept for name, kept in config.take("rank_pattern", {}).items()
        }
        weight = float(config.take("orth_reg_weight", 0.5)) / max(2 * len(found), 1)
        method = AdaLoRA(rank, alpha if alpha > 0 else float(rank), config.take("lora_dropout", 0.0), weight)
        config.ignore(*SCHEDULE, "megatron_core", "qalora_group_size", "ensure_weight_tying")
        config.require("bias", "none")
        deltas = Deltas()
        for name, tensors in found.items():
            module, kept = base.modules[name], np.array(patterns.get(name, [True] * rank), bool).reshape(-1)
            count = int(kept.sum())
            if len(kept) != rank:
                raise InputError(
                    f"{config.path}: the rank_pattern of {name} has {len(kept)} entries, not {rank}"
                )
            check_shape(name, A, tensors, (count, module.inputs))
            check_shape(name, E, tensors, (count, 1))
            check_shape(name, B, tensors, (module.outputs, count))
            a, e, b = (_spread(each, kept) for each in (tensors[A], tensors[E][:, 0], tensors[B].T))
            for part in module.parts:
                deltas[part.path] = Delta(method, {"a": a.T, "e": e, "b": columns_of(b, part)})
        return deltas

    def write(self, deltas: Deltas, base: Base) -> tuple[dict[str, Any], Tensors]:
        """The keys and tensors; raises `InputError` for several dropouts."""
        methods = [delta.method for delta in deltas.values() if isinstance(delta.method, AdaLoRA)]
        if len({method.dropout for method in methods}) > 1:
            raise InputError("PEFT has one dropout in an AdaLoRA adapter; save them apart")
        tensors, patterns, names, first = Tensors(), {}, [], methods[0]
        joined = {
            name: _joined(module, own, first.scale)
            for name, module in base.modules.items()
            if (own := {part.path: deltas[part.path] for part in module.parts if part.path in deltas})
        }
        rank = max(len(e) for _, e, _ in joined.values())
        for name, (a, e, b) in joined.items():
            names.append(name)
            kept = (a != 0).any(1) | (e != 0) | (b != 0).any(0)
            kept = np.concatenate([kept, np.full(rank - len(e), False)])
            if not kept.all():
                patterns[f"{name}.{E}"] = kept.tolist()
            left = kept[: len(e)]
            stored = {A: a[left], E: e[left, None], B: b[:, left]}
            tensors |= {f"{PREFIX}{name}.{suffix}": tensor for suffix, tensor in stored.items()}
        alpha = first.alpha if rank == first.rank else tidy(first.scale * (rank + SMALL))
        keys = {
            "init_r": rank,
            "target_r": rank,
            "total_step": 1,  # PEFT wants some
            "lora_alpha": alpha,
            "lora_dropout": first.dropout,
            "orth_reg_weight": tidy(first.orthogonality * 2 * len(names)),
            "rank_pattern": patterns or None,
            "target_modules": sorted(names),
            "fan_in_fan_out": any(base.modules[name].fan_in_fan_out for name in names),
        }
        return keys, tensors


def _spread(kept: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Zeros along the first axis where a component was taken away."""
    whole = np.zeros((len(where), *kept.shape[1:]), kept.dtype)
    whole[where] = kept
    return whole


def _joined(
    module: Module, own: Mapping[str, Delta], scale: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A `[r, in]`, e `[r]` and B `[out, r]` of a module of theirs, at one scale for all modules.

    Equal A and e of all its parts are stored once, others stacked.
    """
    given = [delta.variables for delta in own.values()]
    first = given[0]
    alike = (np.array_equal(each[key], first[key]) for each in given for key in ("a", "e"))
    once = len(own) == len(module.parts) and all(alike)
    once = once and len({_scale(delta) for delta in own.values()}) == 1
    a = first["a"] if once else np.concatenate([each["a"] for each in given], 1)
    factors = [np.asarray(_scale(delta) / scale, a.dtype) for delta in own.values()]
    values = [each["e"] * factor for each, factor in zip(given, factors)]
    e = values[0] if once else np.concatenate(values)
    b, begin = np.zeros((module.outputs, len(e)), a.dtype), 0
    for part in module.parts:
        if part.path in own:
            rows, real = own[part.path].variables["b"], part.columns >= 0
            b[part.columns[real], begin : begin + len(rows)] = rows.T[real]
            begin += 0 if once else len(rows)
    return a.T, e, b


def _scale(delta: Delta) -> float:
    assert isinstance(delta.method, AdaLoRA)
    return delta.method.scale
