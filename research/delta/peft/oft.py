"""OFT as PEFT stores it: `oft_R.weight` `[blocks, n(n-1)/2]`, the upper triangles of skew matrices.

Their exact Cayley map has the opposite sign of ours, their series has the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from .... import InputError
from ..methods import Method
from ..oft import OFT
from .config import Config
from .files import PREFIX, Tensors
from .lora import check_shape
from .modules import Base
from .places import Delta, Deltas, same_for_all

ROTATION = "oft_R.weight"


class OFTCodec:
    """`peft_type: OFT`."""

    kind: ClassVar[str] = "OFT"
    methods: ClassVar[tuple[type[Method], ...]] = (OFT,)
    suffixes: ClassVar[tuple[str, ...]] = (ROTATION,)

    def read(self, config: Config, found: Mapping[str, Tensors], base: Base) -> Deltas:
        """The deltas of our modules; parts of a fused one turn its input alike."""
        config.ignore("r", "oft_block_size", "module_dropout", "eps")  # the tensors have the size
        config.require("bias", "none")
        config.require("coft", False)
        series, terms = config.take("use_cayley_neumann", True), config.take("num_cayley_neumann_terms", 5)
        shared = config.take("block_share", False)
        version = str(config.values.get("peft_version") or "0")
        if series and (terms < 4 or [int(n) for n in version.split(".")[:2] if n.isdigit()] < [0, 18]):
            raise InputError(
                f"{config.path}: num_cayley_neumann_terms={terms} of PEFT {version} is another series than "
                f"that of at least 4 terms and PEFT 0.18, which is the one that can be read"
            )
        deltas = Deltas()
        for name, tensors in found.items():
            module, blocks = base.modules[name], tensors.get(ROTATION, np.zeros((0, 0)))
            size = round((1 + math.sqrt(1 + 8 * blocks.shape[-1])) / 2)
            count = module.inputs // size
            check_shape(name, ROTATION, tensors, (1 if shared else count, size * (size - 1) // 2))
            method = OFT(size, terms if series else 0)
            own = np.repeat(blocks, count, 0) if shared else blocks
            for part in module.parts:
                deltas[part.path] = Delta(method, {"blocks": own if series else -own})
        return deltas

    def write(self, deltas: Deltas, base: Base) -> tuple[dict[str, Any], Tensors]:
        """The keys and tensors; raises `InputError` for several sizes, and parts that are turned apart."""
        methods = {delta.method for delta in deltas.values()}
        method = next(iter(methods))
        assert isinstance(method, OFT)
        if len(methods) > 1:
            raise InputError(f"PEFT has one block size and one series in an OFT adapter, not {len(methods)}")
        tensors, names = Tensors(), []
        for name, module in base.modules.items():
            own = {part.path: deltas[part.path] for part in module.parts if part.path in deltas}
            if own and module.fan_in_fan_out:
                raise InputError(f"{name}: PEFT has no OFT for weights [in, out] such as Conv1D's")
            if own:
                blocks = same_for_all(module, own, "blocks", "OFT's rotation")
                tensors[f"{PREFIX}{name}.{ROTATION}"] = blocks if method.neumann_terms else -blocks
                names.append(name)
        keys = {
            "r": 0,
            "oft_block_size": method.block_size,
            "use_cayley_neumann": method.neumann_terms > 0,
            "num_cayley_neumann_terms": method.neumann_terms or 5,
            "peft_version": "0.18.0",  # since when the series is this one
            "target_modules": sorted(names),
        }
        return keys, tensors
