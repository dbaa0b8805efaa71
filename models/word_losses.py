"""Cross entropy over words: of logits, or chunk by chunk of the factors that logits are products of."""

from __future__ import annotations

from typing import NamedTuple

from jax import Array
from jax.sharding import Mesh

from .. import InputError
from ..parallel.rules import DEFAULT_RULES, AxisRules, split_axes, ways
from .chunked_loss import ChunkedLoss, chunked_loss
from .losses import weighted_correct, weighted_cross_entropy
from .precision import statistics_dtype
from .word_scores import WordScores

AUTOMATIC_BYTES = 2**28
"""Where nobody says how many tokens' logits a device may hold, they may take as many bytes as this."""


class WordSums(NamedTuple):
    """Summed weighted loss, summed weight, and summed weight of the tokens whose target scores highest."""

    total: Array
    weight: Array
    correct: Array


class WordSplit(NamedTuple):
    """Which axes of a mesh split rows, lengths and words; without a mesh there is one device."""

    mesh: Mesh | None = None
    rules: AxisRules = DEFAULT_RULES

    def axes(self, name: str) -> tuple[str, ...]:
        """The mesh axes that split the logical axis `name`."""
        return () if self.mesh is None else split_axes(self.rules.mesh_axes(name), self.mesh, "the loss")

    def ways(self, name: str) -> int:
        """Into how many parts they split it."""
        return 1 if self.mesh is None else ways(self.mesh, self.axes(name))

    def word_axes(self, words: int) -> tuple[str, ...]:
        """The mesh axes that split a table of so many words; none where they do not divide it."""
        return () if words % self.ways("vocab") else self.axes("vocab")


UNSPLIT = WordSplit()


def word_loss_sums(
    scores: WordScores | Array,
    targets: Array,
    weights: Array,
    *,
    smoothing: float = 0.0,
    chunk: int | None = None,
    split: WordSplit = UNSPLIT,
) -> WordSums:
    """Sums over `targets [B, T]` weighted by `weights [B, T]`, the logits of `chunk` tokens at a time.

    `chunk` counts the tokens whose logits one device holds; 0 is all of its tokens, None as many as
    `AUTOMATIC_BYTES` have room for. Logits that are there already, `[B, T, V]`, are taken whole.
    Raises InputError for a loss in chunks of rows or a length that do not divide over the mesh.
    """
    if isinstance(scores, WordScores):
        if held := chunk_size(scores, targets.shape, chunk, split):
            return _in_chunks(scores, targets, weights, smoothing, held, split)
        scores = scores.logits()
    total, weight = weighted_cross_entropy(scores, targets, weights, smoothing)
    return WordSums(total, weight, weighted_correct(scores, targets, weights))


def chunk_size(scores: WordScores, shape: tuple[int, ...], chunk: int | None, split: WordSplit) -> int:
    """Of how many tokens a device makes the logits at a time, for `shape` `[B, T]`; 0: of all at once."""
    rows, length = shape
    mine = -(-rows // split.ways("batch")) * -(-length // split.ways("length"))
    if chunk is None:
        parts = 1 if split.mesh is None else ways(split.mesh, split.word_axes(scores.words))
        each = scores.words // parts * statistics_dtype(scores.output).itemsize
        chunk = max(1, AUTOMATIC_BYTES // each)
    if chunk < 0:
        raise InputError(f"loss_chunk={chunk} tokens; give at least 1, or 0 for all of a device's tokens")
    return chunk if 0 < chunk < mine else 0


def _in_chunks(
    scores: WordScores, targets: Array, weights: Array, smoothing: float, chunk: int, split: WordSplit
) -> WordSums:
    for what, size, name in (
        ("rows", targets.shape[0], "batch"),
        ("tokens a row", targets.shape[1], "length"),
    ):
        if size % split.ways(name):
            raise InputError(
                f"the loss in chunks: {size} {what} do not divide over {'×'.join(split.axes(name))}="
                f"{split.ways(name)}; use a multiple, fewer micro-batches, or loss_chunk=0"
            )
    weights = weights.astype(statistics_dtype(scores.output))
    loss = ChunkedLoss(
        chunk=chunk,
        smoothing=smoothing,
        vocab=scores.vocab,
        words=scores.words,
        across=scores.across,
        scale=scores.scale,
        output=scores.output,
        stored=scores.weights.dtype.name,
        mesh=split.mesh,
        row_axes=split.axes("batch"),
        length_axes=split.axes("length"),
        word_axes=split.word_axes(scores.words),
    )
    total, correct = chunked_loss(loss, scores.hidden, scores.weights, scores.bias, targets, weights)
    return WordSums(total, weights.sum(), correct)
