"""Checkpoints that generation is measured on: given ones, and random ones made for the occasion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from ... import InputError
from ...models.config import TransformerConfig
from ...models.costs import abstract_parameters
from ...models.presets import PRESETS, modern, preset
from ...models.pretrained import load_pretrained, save_pretrained
from ...models.transformer import Transformer
from .generation import LABELS, ContenderName, Entrant
from .generation_job import GenerationJob

LOOKED_UP = ("position_embedding/table", "type_embedding/table")
LAYERS, WIDTH, HEADS, VOCAB = 12, 768, 12, 50_257  # GPT-2 small's shape


@contextmanager
def peers(
    model: str, contenders: Sequence[ContenderName], prompt: int, new: int
) -> Iterator[dict[str, Entrant]]:
    """Each contender on one checkpoint: a folder's, or a random one in the shape of a GPT-2 preset."""
    with TemporaryDirectory(prefix="modicum-bench-") as temporary:
        if model in PRESETS:
            config = preset(model)
            folder = random_checkpoint(Path(temporary) / model, config, "GPT2LMHeadModel")
        else:
            folder, config = Path(model), load_pretrained(Path(model)).model.config
        job, weights = job_on(folder, config, prompt, new)
        yield {LABELS[name]: Entrant(name, job, weights) for name in dict.fromkeys(contenders)}


@contextmanager
def grouped(kv_heads: Sequence[int], prompt: int, new: int) -> Iterator[dict[str, Entrant]]:
    """Ours on random LLaMA-shaped checkpoints of GPT-2 small's size that differ in their key/value heads."""
    with TemporaryDirectory(prefix="modicum-bench-") as temporary:
        entrants = {}
        for groups in dict.fromkeys(kv_heads):
            config = replace(modern(LAYERS, WIDTH, HEADS, groups, VOCAB), tied=True)
            folder = random_checkpoint(Path(temporary) / f"{groups}", config, "LlamaForCausalLM")
            label = f"{groups} key/value head{'s' if groups > 1 else ''}"
            entrants[label] = Entrant("ours", *job_on(folder, config, prompt, new))
        yield entrants


def random_checkpoint(folder: Path, config: TransformerConfig, architecture: str) -> Path:
    """A model with random weights, saved for all contenders to load."""
    model = Transformer(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return save_pretrained(folder, model, params, architecture=architecture)


def job_on(folder: Path, config: TransformerConfig, prompt: int, new: int) -> tuple[GenerationJob, int]:
    """What is to be generated with a checkpoint, and the bytes of weights that a token reads, in float32.

    Raises `InputError` for a model that is no decoder or has too few positions.
    """
    if config.kind != "decoder":
        raise InputError(f"{folder} holds an {config.kind}; this measures decoders")
    config.positions.require(prompt + new + 1)
    weights = weight_bytes(abstract_parameters(Transformer(config)), config.tied)
    return GenerationJob(str(folder), config.vocab, prompt, new), weights


def weight_bytes(params: Any, tied: bool) -> int:
    """Bytes of the parameters that decoding a token reads whole: of an untied word table it reads a row."""
    skipped = LOOKED_UP if tied else (*LOOKED_UP, "embedding/table")
    leaves = (leaf for path, leaf in flatten_dict(params, sep="/").items() if path not in skipped)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
