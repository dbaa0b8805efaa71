"""IA3 as PEFT stores it: `ia3_l`, `[out, 1]` on a module's outputs or `[1, in]` on a feed-forward's inputs.

Factors of outputs split and join exactly over fused modules; factors of inputs are one for all its parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from .... import InputError
from ..ia3 import IA3
from ..methods import Method
from .config import Config, named_in
from .files import PREFIX, Tensors
from .lora import check_shape, columns_of
from .modules import Base, Module
from .places import Delta, Deltas, same_for_all

FACTORS = "ia3_l"


class IA3Codec:
    """`peft_type: IA3`."""

    kind: ClassVar[str] = "IA3"
    methods: ClassVar[tuple[type[Method], ...]] = (IA3,)
    suffixes: ClassVar[tuple[str, ...]] = (FACTORS,)

    def read(self, config: Config, found: Mapping[str, Tensors], base: Base) -> Deltas:
        """The deltas of our modules."""
        config.ignore("init_ia3_weights")
        names, deltas = config.take("feedforward_modules", None), Deltas()
        for name, tensors in found.items():
            module = base.modules[name]
            inputs = named_in(names, name)
            check_shape(name, FACTORS, tensors, (1, module.inputs) if inputs else (module.outputs, 1))
            scale = tensors[FACTORS].reshape(-1)
            for part in module.parts:
                own = scale if inputs else columns_of(scale, part)
                deltas[part.path] = Delta(IA3("input" if inputs else "output"), {"scale": own})
        return deltas

    def write(self, deltas: Deltas, base: Base) -> tuple[dict[str, Any], Tensors]:
        """The keys and tensors; raises `InputError` for a fused module whose parts differ in their inputs."""
        tensors, feedforward, names = Tensors(), [], []
        for name, module in base.modules.items():
            own = {part.path: deltas[part.path] for part in module.parts if part.path in deltas}
            if not own:
                continue
            sides = {delta.method.on for delta in own.values() if isinstance(delta.method, IA3)}
            if len(sides) > 1:
                raise InputError(f"{name}: IA3 on inputs and on outputs of one module; PEFT has one of them")
            names.append(name)
            if "input" in sides:
                feedforward.append(name)
                tensors[f"{PREFIX}{name}.{FACTORS}"] = same_for_all(module, own, "scale", "the factor")[None]
            else:
                tensors[f"{PREFIX}{name}.{FACTORS}"] = _outputs(module, own)[:, None]
        keys = {
            "target_modules": sorted(names),
            "feedforward_modules": sorted(feedforward),
            "fan_in_fan_out": any(base.modules[name].fan_in_fan_out for name in names),
        }
        return keys, tensors


def _outputs(module: Module, own: Mapping[str, Delta]) -> np.ndarray:
    dtype = next(iter(own.values())).variables["scale"].dtype
    scale = np.ones(module.outputs, dtype)
    for part in module.parts:
        if part.path in own:
            real = part.columns >= 0
            scale[part.columns[real]] = own[part.path].variables["scale"][real]
    return scale
