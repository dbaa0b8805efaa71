"""Which file knows which published models; a family's file is imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from ... import InputError
from .family import Family

# `model_type` of config.json to the file here whose `FAMILIES`, a tuple of `Family`, has it.
MODULES: Mapping[str, str] = {
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
    "bert": "bert",
    "roberta": "roberta",
    "xlm-roberta": "roberta",
    "t5": "t5",
    "opt": "opt",
    "cpmant": "cpm_ant",
    "cpm-live-ant": "cpm_ant",
    "cpmbee": "cpm_bee",
    "cpm-live-bee": "cpm_bee",
    "chatglm": "chatglm",
}


def family(model_type: str) -> Family:
    """The family called `model_type`; raises `InputError` that lists those there are."""
    if not isinstance(model_type, str) or model_type not in MODULES:
        raise InputError(f"model_type {model_type!r} is not supported; valid: {', '.join(MODULES)}")
    module = importlib.import_module(f".{MODULES[model_type]}", __package__)
    return next(found for found in module.FAMILIES if found.name == model_type)


def family_of(architecture: str) -> Family:
    """The family that has this architecture; raises `InputError` that lists all architectures."""
    names: list[str] = []
    for name in MODULES:
        found = family(name)
        if architecture in found.architectures:
            return found
        names += found.architectures
    raise InputError(f"architecture {architecture!r} is not supported; valid: {', '.join(names)}")
