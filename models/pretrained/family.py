"""`Family`: what one kind of published model is called and how it corresponds to ours.

A family's file holds a function from their settings to our configuration and back, and the list of entries.
The machinery (`load`, `save`) is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ... import InputError
from .. import TransformerConfig
from ..heads import Head
from ..mlp import Activation
from .mapping import Entry
from .prepared import Prepared, Rows
from .settings import Settings

Choice = TypeVar("Choice")

# Their names of activation functions to ours. The first name of each of ours is what is written.
ACTIVATIONS: Mapping[str, str] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
}


@dataclass(frozen=True)
class Family:
    """One `model_type` of `transformers`.

    name           `model_type` in config.json
    architectures  names of its classes that can be had, each with the head that it ends in
    read           settings to configuration; reads every key of the family, need not call `finish`
    write          configuration and architecture to the keys of config.json, the inverse of `read`
    entries        tensors of the configuration with a head: their names as in the class with a head
                   (`transformer.h.0...`); for a head of another architecture, at least the backbone's
    prefixes       beginnings of these names that a file may lack (`transformer.`)
    bare           architectures whose files are written without them (`GPT2Model`)
    buffers        regular expressions of names that are no parameters (`attn.bias`), skipped
    extras         of names of parts that have no counterpart here and that no supported output needs (the
                   next-sentence classifier beside BERT's masked-word head): reported in `left_out`
    renamed        (regular expression, replacement) for names of older files, applied first
    prepare        rows of ids, configuration and config.json to prompts with their positions and mask; None
                   where a prompt is its ids
    """

    name: str
    architectures: Mapping[str, Callable[[Settings], Head | None]]
    read: Callable[[Settings], TransformerConfig]
    write: Callable[[TransformerConfig, str], dict[str, Any]]
    entries: Callable[[TransformerConfig, Head | None], Iterable[Entry]]
    prefixes: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    prepare: Callable[[Rows, TransformerConfig, Mapping[str, Any]], Prepared] | None = None

    def head(self, architecture: str, settings: Settings) -> Head | None:
        """The head of an architecture; raises `InputError` that lists those there are."""
        if architecture not in self.architectures:
            valid = ", ".join(self.architectures)
            raise InputError(f"architecture {architecture!r} of {self.name} is not supported; valid: {valid}")
        return self.architectures[architecture](settings)


def activation(settings: Settings, key: str, default: str) -> str:
    """Our name of the activation function that `key` names; an unknown one is refused."""
    name = settings.take(key, default)
    if name not in ACTIVATIONS:
        settings.refuse(f"{key}={name!r} (valid: {', '.join(ACTIVATIONS)})")
        return ACTIVATIONS[default]
    return ACTIVATIONS[name]


def their_activation(ours: Activation) -> str:
    """The name that config.json has for one of our activation functions; raises `InputError` without one."""
    found = next((theirs for theirs, name in ACTIVATIONS.items() if name == ours), None)
    if found is None:
        known = ", ".join(dict.fromkeys(ACTIVATIONS.values()))
        raise InputError(f"activation {ours!r} has no name in published checkpoints; these have: {known}")
    return found


def choice(config: TransformerConfig, field: str, kind: type[Choice]) -> Choice:
    """A part of the configuration, which the family needs to be of this kind: for `write`."""
    value = getattr(config, field)
    if not isinstance(value, kind):
        found = type(value).__name__
        raise InputError(
            f"a model with {field}={found} cannot be written as this family; it has {kind.__name__}"
        )
    return value
