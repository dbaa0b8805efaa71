"""Prefix tuning as PEFT stores it: `prompt_embeddings` `[n, 2 L G K]`, a key and a value for every layer.

PEFT gives the prefix as past keys, so tokens stand at n, n + 1, ...: here that is `ShiftPositions` beside
`Prefix`. Keys are not rotated by either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from .... import InputError
from ..methods import Method
from ..prefix import Prefix
from ..shift_positions import ShiftPositions
from .config import Config
from .files import Tensors
from .modules import QUERY, Base
from .places import Delta, Deltas

PROMPT = "prompt_embeddings"


class PrefixCodec:
    """`peft_type: PREFIX_TUNING`."""

    kind: ClassVar[str] = "PREFIX_TUNING"
    methods: ClassVar[tuple[type[Method], ...]] = (Prefix, ShiftPositions)
    suffixes: ClassVar[tuple[str, ...]] = (PROMPT,)

    def read(self, config: Config, found: Mapping[str, Tensors], base: Base) -> Deltas:
        """A prefix for each layer, and the positions moved behind it."""
        paths, groups, width = _attention(base)
        config.ignore("encoder_hidden_size", "prefix_projection")  # what is stored is made already
        config.ignore("num_layers", "num_attention_heads", "token_dim", "num_transformer_submodules")
        prompt = found.get("", {}).get(PROMPT)
        length = config.take("num_virtual_tokens", 0)
        shape = (length, 2 * len(paths) * groups * width)
        if prompt is None or prompt.shape != shape:
            has = "absent" if prompt is None else f"of shape {list(prompt.shape)}"
            raise InputError(
                f"{config.path.parent}: {PROMPT} is {has}; num_virtual_tokens={length} and the base "
                f"model make it {list(shape)}"
            )
        layers = prompt.reshape(length, len(paths), 2, groups, width)
        deltas = Deltas({"": Delta(ShiftPositions(length), {})})
        for index, path in enumerate(paths):
            key, value = layers[:, index, 0], layers[:, index, 1]
            deltas[path] = Delta(Prefix(length), {"key": key, "value": value})
        return deltas

    def write(self, deltas: Deltas, base: Base) -> tuple[dict[str, Any], Tensors]:
        """The keys and the tensor; raises `InputError` unless every layer has a prefix of one length."""
        paths, groups, width = _attention(base)
        lengths = {path: _length(delta) for path, delta in deltas.items()}
        count = lengths.get(paths[0])
        wanted = {"": count} | dict.fromkeys(paths, count)
        if lengths != wanted:
            wrong = next(path for path in {**wanted, **lengths} if wanted.get(path) != lengths.get(path))
            raise InputError(
                f"{wrong or 'the root'}: PEFT's prefix is as long in every layer, and tokens stand after "
                f"it: give Prefix(n) at 'attention' and ShiftPositions(n) at ''; here it has "
                f"{lengths.get(wrong)}, not {count}"
            )
        pairs = [_folded(deltas[path]) for path in paths]
        layers = np.stack([np.stack(pair, 1) for pair in pairs], 1)  # [n, L, 2, G, K]
        keys = {
            "num_virtual_tokens": count,
            "num_layers": len(paths),
            "num_attention_heads": groups,
            "token_dim": groups * width,
            "num_transformer_submodules": 1,
            "prefix_projection": False,
        }
        return keys, {PROMPT: layers.reshape(layers.shape[0], -1)}


def _attention(base: Base) -> tuple[list[str], int, int]:
    """The paths of the layers' attention in order, and the number and width of key heads."""
    config = base.model.config
    if config.kind != "decoder":
        raise InputError(
            f"{base.architecture}: prefix tuning is exchanged with PEFT for decoders alone; in an "
            f"encoder-decoder PEFT repeats the prefix of half of the layers, at relative positions"
        )
    paths = [f"layers_{index}/attention" for index in range(config.layers)]
    attention = config.attention
    missing = [path for path in paths if path not in base.sites]
    if missing or not hasattr(attention, "groups"):
        raise InputError(f"{base.architecture} has no {QUERY[1:]} matrices that a prefix could stand beside")
    return paths, attention.groups, attention.width_of_head(config.width)


def _length(delta: Delta) -> int | None:
    method = delta.method
    if isinstance(method, Prefix):
        return method.length if delta.variables["on"] == 1 else None
    return method.by if isinstance(method, ShiftPositions) else None


def _folded(delta: Delta) -> tuple[np.ndarray, np.ndarray]:
    method = delta.method
    assert isinstance(method, Prefix)
    key, value = method.keys_and_values({name: jnp.asarray(each) for name, each in delta.variables.items()})
    return np.asarray(key), np.asarray(value)
