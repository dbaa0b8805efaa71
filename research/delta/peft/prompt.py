"""Prompt tuning and P-tuning as PEFT stores them: `prompt_embeddings`, a row for each virtual token.

P-tuning's encoder is not stored, what it makes is. PEFT makes rows for the decoder of an encoder-decoder too
and uses those of the encoder alone, which come first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from .... import InputError
from ..input_prompt import InputPrompt
from ..methods import Method
from ..prompt_encoder import PromptEncoder
from ..soft_prompt import SoftPrompt
from .config import Config
from .files import Tensors
from .modules import Base
from .places import Delta, Deltas
from .prefix import PROMPT

# How the prompt began, and the network that made it.
BEGINNINGS = ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")
ENCODER = (
    "encoder_reparameterization_type",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_dropout",
)


class PromptCodec:
    """`peft_type: PROMPT_TUNING`."""

    kind: ClassVar[str] = "PROMPT_TUNING"
    methods: ClassVar[tuple[type[Method], ...]] = (SoftPrompt, PromptEncoder)
    suffixes: ClassVar[tuple[str, ...]] = (PROMPT,)

    def read(self, config: Config, found: Mapping[str, Tensors], base: Base) -> Deltas:
        """A soft prompt at the root; raises `InputError` for one of another size."""
        config.ignore("num_layers", "num_attention_heads", "token_dim", *BEGINNINGS, *ENCODER)
        length = config.take("num_virtual_tokens", 0)
        both = base.model.config.kind == "encoder-decoder"
        stacks = config.take("num_transformer_submodules", 0) or (2 if both else 1)
        prompt, shape = found.get("", {}).get(PROMPT), (length * stacks, base.model.config.width)
        if prompt is None or prompt.shape != shape or length < 1:
            has = "absent" if prompt is None else f"of shape {list(prompt.shape)}"
            raise InputError(
                f"{config.path.parent}: {PROMPT} is {has}; num_virtual_tokens={length} and the base model "
                f"make it {list(shape)}"
            )
        return Deltas({"": Delta(SoftPrompt(length), {"prompt": prompt[:length]})})

    def write(self, deltas: Deltas, base: Base) -> tuple[dict[str, Any], Tensors]:
        """The keys and the tensor."""
        method, variables = deltas[""].method, deltas[""].variables
        assert isinstance(method, InputPrompt)
        prompt = np.asarray(method.prompt({name: jnp.asarray(each) for name, each in variables.items()}))
        config = base.model.config
        keys = {
            "num_virtual_tokens": method.length,
            "num_layers": config.layers,
            "num_attention_heads": config.attention.heads,
            "token_dim": config.width,
            "num_transformer_submodules": 1,
        }
        return keys, {PROMPT: prompt}


class EncodedPromptCodec(PromptCodec):
    """`peft_type: P_TUNING`; what is written is a plain prompt."""

    kind: ClassVar[str] = "P_TUNING"
    methods: ClassVar[tuple[type[Method], ...]] = ()
