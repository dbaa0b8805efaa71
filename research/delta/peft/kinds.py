"""PEFT's kinds of adapters and who reads and writes each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from .... import InputError
from ..methods import Method
from .adalora import AdaLoRACodec
from .config import Config
from .files import Tensors
from .ia3 import IA3Codec
from .lora import LoRACodec
from .modules import Base
from .oft import OFTCodec
from .places import Deltas
from .prefix import PrefixCodec
from .prompt import EncodedPromptCodec, PromptCodec
from .vera import VeRACodec


class Codec(Protocol):
    """One `peft_type`: `suffixes` are the ends of its tensors' names, `methods` ours that it stores."""

    kind: ClassVar[str]
    methods: ClassVar[tuple[type[Method], ...]]
    suffixes: ClassVar[tuple[str, ...]]

    def read(self, config: Config, found: Mapping[str, Tensors], base: Base) -> Deltas:
        """Our deltas from their tensors by module."""

    def write(self, deltas: Deltas, base: Base) -> tuple[dict[str, Any], Tensors]:
        """Keys of the configuration and tensors by their names in the file."""


CODECS: tuple[Codec, ...] = (
    LoRACodec(),
    IA3Codec(),
    PrefixCodec(),
    PromptCodec(),
    EncodedPromptCodec(),
    AdaLoRACodec(),
    VeRACodec(),
    OFTCodec(),
)


def codec_of(config: Config) -> Codec:
    """The codec of an adapter's kind; raises `InputError` that lists those there are."""
    for codec in CODECS:
        if codec.kind == config.kind:
            return codec
    valid = ", ".join(codec.kind for codec in CODECS)
    raise InputError(f"{config.path}: peft_type={config.kind!r} is not supported; valid: {valid}")


def codec_for(method: Method) -> Codec | None:
    """The codec that stores a method of ours, None where PEFT has nothing like it."""
    return next((codec for codec in CODECS if type(method) in codec.methods), None)
