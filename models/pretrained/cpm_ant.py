"""CPM-Ant (OpenBMB, 2022): `CpmAntForCausalLM` of `transformers`, and the files of CPM-Live itself.

Both have the same tensors. CPM-Live divides the product of each linear layer by the square root of its
input's width, and embeddings by that of theirs; in `transformers` the weights are divided. There the prompts
are further rows of the words' table, in CPM-Live a table of their own. A file of CPM-Live becomes loadable as
safetensors, with `"model_type": "cpm-live-ant"` and `"architectures": ["CPMAnt"]` added to its configuration
as config.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import sqrt
from typing import Any

import numpy as np

from ... import InputError
from .. import (
    GatedMLP,
    GroupedQuery,
    LanguageModelHead,
    Layer,
    RMSNorm,
    SegmentPositions,
    SegmentRelations,
    TransformerConfig,
)
from ..heads import Head
from ..kernels import Full, Mask
from .family import Family, choice
from .mapping import Entry, Rows, Transposed, linear, norm
from .prepared import Prepared, checked, given_first, padded
from .prepared import Rows as Ids
from .settings import Settings

TASK, TEXT = 2, 2  # the published model's prompt, and the segment of a text


def read(settings: Settings) -> TransformerConfig:
    """The configuration of `transformers`' class."""
    take = settings.take
    return _config(
        settings,
        layers=take("num_hidden_layers", 48),
        width=take("hidden_size", 4096),
        heads=take("num_attention_heads", 32),
        tied=take("tie_word_embeddings", True),
        initial_std=float(take("init_std", 1.0)),
    )


def read_live(settings: Settings) -> TransformerConfig:
    """The configuration of CPM-Live, whose products are scaled and whose compressed models lack sublayers."""
    take = settings.take
    width, layers = take("dim_model"), take("num_layers")
    settings.ignore("half")
    return _config(
        settings,
        layers=layers,
        width=width,
        heads=take("num_heads"),
        scale=1 / sqrt(width),
        pattern=masked_modules(settings, layers),
        scaled_linears=True,
    )


def _config(
    settings: Settings, *, layers: int, width: int, heads: int, scale: float = 1.0, **more: Any
) -> TransformerConfig:
    take = settings.take
    prompts, prompt_length = take("prompt_types", 32), take("prompt_length", 32)
    return TransformerConfig(
        layers=layers,
        width=width,
        vocab=take("vocab_size", 30_720),
        input_rows=prompts * prompt_length,
        attention=GroupedQuery(heads, heads, take("dim_head", 128), bias=False),
        mlp=GatedMLP(take("dim_ff", 10_240), "gelu"),
        norm=RMSNorm(float(take("eps", 1e-6))),
        positions=SegmentRelations(
            take("segment_types", 32),
            take("position_bias_num_buckets", 512),
            take("position_bias_max_distance", 2048),
            scale,
            prompt_length,
        ),
        embedding_scale=scale,
        logit_scale=scale,
        dropout=float(take("dropout_p", 0.0) or 0.0),
        **more,
    )


def masked_modules(settings: Settings, layers: int) -> tuple[Layer, ...]:
    """The layers of a compressed model: `mask_modules` is true for the attention, the mlp that it lacks."""
    masks = settings.take("mask_modules", None)
    if masks is None or not any(map(any, masks)):
        return ()
    if len(masks) != layers or any(len(pair) != 2 for pair in masks):
        settings.refuse(f"mask_modules={masks!r} (valid: {layers} pairs of true and false)")
        return ()
    names = ("attention", "mlp")
    return tuple(Layer(without=tuple(n for n, gone in zip(names, pair) if gone)) for pair in masks)


def write(config: TransformerConfig, architecture: str) -> dict[str, Any]:
    """The keys of config.json for `transformers`."""
    own = {
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.attention.heads,
        "tie_word_embeddings": config.tied,
        "init_std": config.initial_std,
    }
    return own | _written(config)


def write_live(config: TransformerConfig, architecture: str) -> dict[str, Any]:
    """The keys of CPM-Live's configuration."""
    own = {"num_layers": config.layers, "dim_model": config.width, "num_heads": config.attention.heads}
    return own | write_masked_modules(config) | _written(config)


def write_masked_modules(config: TransformerConfig) -> dict[str, Any]:
    """The key of a compressed model."""
    names = ("attention", "mlp")
    masks = [[config.lacks(index, name) for name in names] for index in range(config.layers)]
    return {"mask_modules": masks} if config.pattern else {}


def _written(config: TransformerConfig) -> dict[str, Any]:
    attention = choice(config, "attention", GroupedQuery)
    positions = choice(config, "positions", SegmentRelations)
    return {
        "vocab_size": config.vocab,
        "dim_head": attention.width_of_head(config.width),
        "dim_ff": choice(config, "mlp", GatedMLP).width or 4 * config.width,
        "dropout_p": config.dropout,
        "position_bias_num_buckets": positions.buckets,
        "position_bias_max_distance": positions.max_distance,
        "eps": choice(config, "norm", RMSNorm).epsilon,
        "prompt_types": config.input_rows // positions.prompt_length,
        "prompt_length": positions.prompt_length,
        "segment_types": positions.kinds,
    }


def entries(config: TransformerConfig, head: Head | None) -> Iterator[Entry]:
    """The tensors of `CpmAntForCausalLM`, which keeps the words' part of a tied table twice."""
    rows = Rows(0, config.vocab + config.input_rows)
    yield Entry("cpmant.input_embedding.weight", "embedding/table", rows)
    yield Entry("cpmant.segment_embedding.weight", "type_embedding/table")
    yield from stack(config, "cpmant.")
    if isinstance(head, LanguageModelHead) and config.tied:
        yield Entry("lm_head.weight", "embedding/table", Rows(0, config.vocab), again=True)
    elif isinstance(head, LanguageModelHead):
        yield Entry("lm_head.weight", "head/kernel", Rows(0, config.vocab, 1, Transposed()))


def entries_live(config: TransformerConfig, head: Head | None) -> Iterator[Entry]:
    """The tensors of CPM-Live's `CPMAnt`."""
    words, rows = config.vocab, config.vocab + config.input_rows
    yield Entry("input_embedding.weight", "embedding/table", Rows(0, words))
    yield Entry("prompt_embedding.weight", "embedding/table", Rows(words, rows))
    yield Entry("segment_embedding.weight", "type_embedding/table")
    yield from stack(config, "")


def stack(config: TransformerConfig, prefix: str) -> Iterator[Entry]:
    """The tensors that CPM-Ant and CPM-Bee have alike: the layers, the last norm and the bias."""
    yield Entry(f"{prefix}position_bias.relative_attention_bias", "relative_bias/table")
    for index in range(config.layers):
        theirs, ours = f"{prefix}encoder.layers.{index}", f"layers_{index}"
        if not config.lacks(index, "attention"):
            yield from _attention(f"{theirs}.self_att", ours)
        if not config.lacks(index, "mlp"):
            yield from _mlp(f"{theirs}.ffn", ours)
    yield from norm(f"{prefix}encoder.output_layernorm", "final_norm", bias=False)


def _attention(theirs: str, ours: str) -> Iterator[Entry]:
    yield from norm(f"{theirs}.layernorm_before_attention", f"{ours}/attention_norm", bias=False)
    names = {"project_q": "query", "project_k": "key", "project_v": "value", "attention_out": "output"}
    for name, own in names.items():
        yield from linear(f"{theirs}.self_attention.{name}", f"{ours}/attention/{own}", bias=False)


def _mlp(theirs: str, ours: str) -> Iterator[Entry]:
    yield from norm(f"{theirs}.layernorm_before_ffn", f"{ours}/mlp_norm", bias=False)
    for name, own in {"w_in.w_0": "gate", "w_in.w_1": "up", "w_out": "down"}.items():
        yield from linear(f"{theirs}.ffn.{name}", f"{ours}/mlp/{own}", bias=False)


def prepare(
    rows: Ids, config: TransformerConfig, *, task: int = TASK, given: Sequence[int] | None = None
) -> Prepared:
    """Rows of ids with the prompt of `task` before each, for a text to be read and continued.

    The prompt is segment 0, the text segment 2, and so are the tokens generated after it; all that is given
    sees all that is given. With `given`, only so many tokens of each row are: those after them see what is
    given and what is before them, as where they are to be learned or were generated.

    `transformers`' class does this within its forward pass, with the padding between prompt and text. No
    distance is taken across segments, so here it stands before both.

    Raises `InputError` for rows that are no ids, for a task that the model has no prompt of and where `given`
    does not fit the rows.
    """
    prompt_length = choice(config, "positions", SegmentRelations).prompt_length
    tasks = config.input_rows // prompt_length
    if not 0 <= task < tasks:
        raise InputError(
            f"task={task}; the model has prompts of {prompt_length} tokens for tasks 0 to {tasks - 1}"
        )
    prompt = config.vocab + prompt_length * task + np.arange(prompt_length)
    tokens = [np.concatenate([prompt, row]) for row in checked(rows)]
    kinds = [np.where(np.arange(len(row)) < prompt_length, 0, TEXT) for row in tokens]
    segments = padded([np.ones_like(row) for row in tokens])
    index = np.broadcast_to(np.arange(segments.shape[1], dtype=np.int32), segments.shape)
    positions = SegmentPositions(index, padded(kinds))  # type: ignore[arg-type]
    after = _not_given(rows, given)

    def mask(segments: Any) -> Mask:
        width = segments.shape[1]
        return given_first(np.arange(width) < width - after[:, None]) if after.any() else Full()

    return Prepared(padded(tokens), segments, positions, mask, prompt_length)


def _not_given(rows: Ids, given: Sequence[int] | None) -> np.ndarray:
    """How many tokens at the end of each row are not given, `[B]`."""
    lengths = np.array([len(row) for row in rows])
    counts = lengths if given is None else np.asarray(given)
    if counts.shape != lengths.shape or (counts < 0).any() or (counts > lengths).any():
        raise InputError(
            f"given is {counts.tolist()} for rows of {lengths.tolist()} tokens; at most these are valid"
        )
    return lengths - counts


FAMILIES = (
    Family(
        name="cpmant",
        architectures={"CpmAntForCausalLM": lambda _: LanguageModelHead(), "CpmAntModel": lambda _: None},
        read=read,
        write=write,
        entries=entries,
        prefixes=("cpmant.",),
        bare=("CpmAntModel",),
        prepare=lambda rows, config, settings: prepare(rows, config),
    ),
    Family(
        name="cpm-live-ant",
        architectures={"CPMAnt": lambda _: LanguageModelHead()},
        read=read_live,
        write=write_live,
        entries=entries_live,
        prepare=lambda rows, config, settings: prepare(rows, config),
    ),
)
