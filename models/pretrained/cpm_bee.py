"""CPM-Bee (OpenBMB, 2023): the files of its repository, and those of the hub's own classes.

CPM-Ant's layers, with products scaled by the square root of their input's width in both kinds of files,
residuals divided by 1.05, words of one name turned apart, and a bias that goes by the tree of a JSON text.
The hub's files have `"model_type": "cpmbee"` and names that begin with `cpmbee.`. A file of the repository
becomes loadable as safetensors, with `"model_type": "cpm-live-bee"` and `"architectures": ["CPMBee"]` added
to its configuration as config.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from math import sqrt
from typing import Any

from ... import InputError
from .. import ExtendedHead, GatedMLP, GroupedQuery, PreNorm, RMSNorm, TransformerConfig, TreeRelations
from ..heads import Head
from .cpm_ant import masked_modules, stack, write_masked_modules
from .family import Family, choice
from .mapping import Entry
from .mapping import Rows as Part
from .prepared import Prepared, Rows
from .settings import Settings

DIVISOR = 1.05  # of the residual stream after each sublayer (`cpm_live/layers/blocks.py`)
HUB = {"layers": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads"}
LIVE = {"layers": "num_layers", "width": "dim_model", "heads": "num_heads"}


def read(keys: dict[str, str], settings: Settings) -> TransformerConfig:
    """The configuration, of which `keys` name depth, width and heads."""
    take = settings.take
    width, layers, heads = take(keys["width"], 4096), take(keys["layers"], 48), take(keys["heads"], 32)
    settings.ignore("half", "init_std")
    scale = 1 / sqrt(width)
    return TransformerConfig(
        layers=layers,
        width=width,
        vocab=take("vocab_size", 86_583),
        attention=GroupedQuery(heads, heads, take("dim_head", 128), bias=False),
        mlp=GatedMLP(take("dim_ff", 10_240), "gelu"),
        norm=RMSNorm(float(take("eps", 1e-6))),
        positions=TreeRelations(
            take("position_bias_num_buckets", 256),
            take("position_bias_num_segment_buckets", 256),
            take("position_bias_max_distance", 2048),
            take("distance_scale", 16),
        ),
        residual=PreNorm(divisor=DIVISOR),
        pattern=masked_modules(settings, layers),
        embedding_scale=scale,
        logit_scale=scale,
        scaled_linears=True,
        dropout=float(take("dropout_p", 0.0) or 0.0),
    )


def write(keys: dict[str, str], config: TransformerConfig, architecture: str) -> dict[str, Any]:
    """The keys of config.json; raises `InputError` for another divisor of the residual stream."""
    if config.residual != PreNorm(divisor=DIVISOR):
        raise InputError(f"residual is {config.residual}; CPM-Bee has {PreNorm(divisor=DIVISOR)}")
    positions = choice(config, "positions", TreeRelations)
    own = {keys["layers"]: config.layers, keys["width"]: config.width, keys["heads"]: config.attention.heads}
    return {
        **own,
        **write_masked_modules(config),
        "vocab_size": config.vocab,
        "dim_head": config.attention.width_of_head(config.width),
        "dim_ff": choice(config, "mlp", GatedMLP).width or 4 * config.width,
        "dropout_p": config.dropout,
        "position_bias_num_buckets": positions.buckets,
        "position_bias_num_segment_buckets": positions.relations,
        "position_bias_max_distance": positions.max_distance,
        "distance_scale": positions.sub_step,
        "eps": choice(config, "norm", RMSNorm).epsilon,
    }


def entries(prefix: str, config: TransformerConfig, head: Head | None) -> Iterator[Entry]:
    """The tensors under names that begin with `prefix`."""
    words = Part(0, config.vocab)
    yield Entry(f"{prefix}input_embedding.weight", "embedding/table", words, ("lm_head.weight",))
    yield from stack(config, prefix)


def refuse_text(rows: Rows, config: TransformerConfig, settings: Mapping[str, Any]) -> Prepared:
    """Raises `InputError`: what CPM-Bee reads is no text."""
    raise InputError("CPM-Bee reads tasks in JSON, not rows of ids; use modicum.models.pretrained.cpm.answer")


def _family(name: str, architecture: str, keys: dict[str, str], prefix: str) -> Family:
    return Family(
        name=name,
        architectures={architecture: lambda _: ExtendedHead()},
        read=partial(read, keys),
        write=partial(write, keys),
        entries=partial(entries, prefix),
        prefixes=(prefix,) if prefix else (),
        buffers=(r"inv_freq$",),
        prepare=refuse_text,
    )


FAMILIES = (
    _family("cpmbee", "CpmBeeForCausalLM", HUB, "cpmbee."),
    _family("cpm-live-bee", "CPMBee", LIVE, ""),
)
