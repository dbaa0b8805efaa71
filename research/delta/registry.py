"""The methods by the names that delta files store."""

from __future__ import annotations

from collections.abc import Mapping

from .adapter import Adapter
from .bitfit import BitFit
from .full import Full
from .lora import LoRA
from .methods import Method

METHODS: Mapping[str, type[Method]] = {
    each.name: each
    for each in (
        LoRA,
        Adapter,
        BitFit,
        Full,
    )
}
