"""ChatGLM-6B (THUDM, 2023; Du et al., "GLM", 2022): a prefix read in both directions, then text to its right.

The residual stream goes on from the norm's output times sqrt(2 L), the positions have two dimensions, and
queries, keys and values of a head lie together. The published code divides the scores of layer l by l + 1
before the softmax and multiplies them again, against overflow in float16: the same mathematics, left away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isclose, sqrt
from typing import Any

import numpy as np

from ... import InputError
from .. import MLP, GroupedQuery, LanguageModelHead, LayerNorm, NormedResidual, Rotary2D, TransformerConfig
from ..heads import Head
from ..kernels import Mask, Prefix
from .family import Family, choice
from .mapping import Entry, InterleavedHeads, Rows, Transposed, linear, norm
from .prepared import Prepared, checked, padded
from .prepared import Rows as Ids
from .settings import Settings

BOS, MASK, GMASK = 130_004, 130_000, 130_001  # <sop>, [MASK] and [gMASK] of the vocabulary of 130,528


def read(settings: Settings) -> TransformerConfig:
    """The configuration of a ChatGLM-6B of the later vocabulary and the first."""
    take = settings.take
    heads, layers = take("num_attention_heads", 32), take("num_layers", 28)
    settings.require("position_encoding_2d", True)
    if take("quantization_bit", 0):
        settings.refuse("quantization_bit (valid: 0; load the weights in float16 or float32)")
    if take("pre_seq_len", None) is not None or take("prefix_projection", False):
        settings.refuse("pre_seq_len, prefix_projection (valid: none; P-tuning's prefixes are not imported)")
    # Special tokens are arguments of `prepare`; a length limits what was trained, no tensor.
    settings.ignore("max_sequence_length", "mask_token_id", "gmask_token_id", "quantization_embeddings")
    return TransformerConfig(
        layers=layers,
        width=take("hidden_size", 4096),
        vocab=take("vocab_size", 130_528),
        attention=GroupedQuery(heads, heads),
        mlp=MLP(take("inner_hidden_size", 16_384), "gelu_tanh"),
        norm=LayerNorm(float(take("layernorm_epsilon", 1e-5))),
        positions=Rotary2D(),
        residual=NormedResidual(sqrt(2 * layers)),
        tied=take("tie_word_embeddings", True),
    )


def write(config: TransformerConfig, architecture: str) -> dict[str, Any]:
    """The keys of config.json; raises `InputError` for a residual factor other than sqrt(2 L)."""
    alpha, wanted = choice(config, "residual", NormedResidual).alpha, sqrt(2 * config.layers)
    if not isclose(alpha, wanted):
        raise InputError(f"residual has alpha={alpha}; a ChatGLM of {config.layers} layers has {wanted}")
    choice(config, "positions", Rotary2D)
    return {
        "num_layers": config.layers,
        "hidden_size": config.width,
        "vocab_size": config.vocab,
        "num_attention_heads": config.attention.heads,
        "inner_hidden_size": choice(config, "mlp", MLP).width or 4 * config.width,
        "layernorm_epsilon": choice(config, "norm", LayerNorm).epsilon,
        "position_encoding_2d": True,
        "tie_word_embeddings": config.tied,
    }


def entries(config: TransformerConfig, head: Head | None) -> Iterator[Entry]:
    """The tensors of `ChatGLMForConditionalGeneration`."""
    copies = ("lm_head.weight",) if config.tied else ()
    yield Entry("transformer.word_embeddings.weight", "embedding/table", Rows(0, config.vocab), copies)
    for index in range(config.layers):
        yield from _layer(f"transformer.layers.{index}", f"layers_{index}", config.attention.heads)
    yield from norm("transformer.final_layernorm", "final_norm")
    if isinstance(head, LanguageModelHead) and not config.tied:
        yield Entry("lm_head.weight", "head/kernel", Rows(0, config.vocab, 1, Transposed()))


def _layer(theirs: str, ours: str, heads: int) -> Iterator[Entry]:
    yield from norm(f"{theirs}.input_layernorm", f"{ours}/attention_norm")
    yield from norm(f"{theirs}.post_attention_layernorm", f"{ours}/mlp_norm")
    fused = f"{theirs}.attention.query_key_value"
    for index, name in enumerate(("query", "key", "value")):
        kernel, bias = InterleavedHeads(index, heads, transposed=True), InterleavedHeads(index, heads)
        yield Entry(f"{fused}.weight", f"{ours}/attention/{name}/kernel", kernel)
        yield Entry(f"{fused}.bias", f"{ours}/attention/{name}/bias", bias)
    yield from linear(f"{theirs}.attention.dense", f"{ours}/attention/output")
    yield from linear(f"{theirs}.mlp.dense_h_to_4h", f"{ours}/mlp/up")
    yield from linear(f"{theirs}.mlp.dense_4h_to_h", f"{ours}/mlp/down")


def prepare(
    rows: Ids, *, bos: int = BOS, mask: int = MASK, gmask: int = GMASK, early: bool = False
) -> Prepared:
    """Rows of ids with a [gMASK] or [MASK] and a `bos` in each: a prompt, and perhaps text after the `bos`.

    What stands before the `bos` is seen by all; from it on a token sees itself and what is before it. A token
    before the `bos` has its index as position and 0 in its block; from the `bos` on the position is that of
    the mask token and 1, 2, ... in the block. `early` is the rule of the first release, where the
    positions of a text after [gMASK] count on instead.

    Raises `InputError` for a row without a `bos` or a mask token.
    """
    positions, after = [], []
    for number, row in enumerate(checked(rows)):
        start, masked = _index(row, bos, number, "bos"), _masked(row, mask, gmask, number)
        index = np.arange(len(row))
        frozen = not (early and gmask in row and mask not in row)
        place = np.where((index >= start) & frozen, masked, index)
        positions.append(np.stack([place, np.maximum(index - start + 1, 0)], -1))
        after.append(len(row) - start)
    tokens = checked(rows)

    def prefix(segments: Any) -> Mask:
        return Prefix(segments.shape[1] - np.asarray(after, np.int32))

    segments = padded([np.ones_like(row) for row in tokens])
    return Prepared(padded(tokens), segments, padded(positions), prefix)


def _masked(row: np.ndarray, mask: int, gmask: int, number: int) -> int:
    """Where the mask token is that the text after `bos` fills: the [gMASK] where there is one."""
    return _index(row, gmask if gmask in row else mask, number, "gmask or mask")


def _index(row: np.ndarray, token: int, number: int, name: str) -> int:
    found = np.flatnonzero(row == token)
    if not found.size:
        raise InputError(f"rows[{number}] has no {name} (token {token}), which a prompt needs")
    return int(found[0])


def prepare_with(rows: Ids, config: TransformerConfig, settings: Mapping[str, Any]) -> Prepared:
    """`prepare` with the special tokens that config.json names."""
    names = {"bos_token_id": BOS, "mask_token_id": MASK, "gmask_token_id": GMASK}
    bos, mask, gmask = (int(settings.get(name, own)) for name, own in names.items())
    return prepare(rows, bos=bos, mask=mask, gmask=gmask)


FAMILIES = (
    Family(
        name="chatglm",
        # The published config.json names the first, and the file has the head.
        architectures={
            "ChatGLMModel": lambda _: LanguageModelHead(),
            "ChatGLMForConditionalGeneration": lambda _: LanguageModelHead(),
        },
        read=read,
        write=write,
        entries=entries,
        prefixes=("transformer.",),
        buffers=(r"rotary_emb\.inv_freq$",),
        prepare=prepare_with,
    ),
)
