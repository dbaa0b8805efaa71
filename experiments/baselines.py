"""What a study's numbers stand beside: models that count."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ..research.data.batches import Batch
from ..research.data.packing import Packed

PRIORS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


def majority_accuracy(train: np.ndarray, test: np.ndarray) -> float:
    """Accuracy of always saying the train split's most frequent label."""
    return float(np.mean(test == np.bincount(train).argmax()))


def naive_bayes_accuracy(
    train: Sequence[np.ndarray],
    labels: np.ndarray,
    test: Sequence[np.ndarray],
    truth: np.ndarray,
    vocab: int,
) -> float:
    """Accuracy of multinomial naive Bayes on token counts, add-one smoothed; examples are `[T]` token ids."""
    classes = int(labels.max()) + 1
    counts = np.ones((classes, vocab))
    for tokens, label in zip(train, labels):
        counts[label] += np.bincount(tokens, minlength=vocab)
    log_likelihood = np.log(counts / counts.sum(1, keepdims=True))
    log_prior = np.log(np.bincount(labels, minlength=classes) / len(labels))
    scores = [log_prior + log_likelihood[:, tokens].sum(1) for tokens in test]
    return float(np.mean(np.argmax(scores, 1) == truth))


class BigramModel:
    """P(b | a) = (n(a, b) + α P(b)) / (n(a) + α): counts with the unigram distribution as prior.

    MacKay and Peto, "A Hierarchical Dirichlet Language Model" (1995). `pairs` `[2, n]` are tokens and the
    tokens after them; α is chosen among `PRIORS` on the last tenth of them, which is not counted.
    """

    def __init__(self, pairs: np.ndarray, vocab: int) -> None:
        border = pairs.shape[1] * 9 // 10
        self._count(pairs[:, :border], vocab)
        self.prior = min(PRIORS, key=lambda prior: self.loss(pairs[:, border:], prior))

    def loss(self, pairs: np.ndarray, prior: float | None = None) -> float:
        """Mean negative log likelihood in nats of the second of each pair."""
        alpha = self.prior if prior is None else prior
        joint, first = self._joint[pairs[0], pairs[1]], self._first[pairs[0]]
        return float(-np.log((joint + alpha * self._unigram[pairs[1]]) / (first + alpha)).mean())

    def _count(self, pairs: np.ndarray, vocab: int) -> None:
        flat = pairs[0].astype(np.int64) * vocab + pairs[1]
        self._joint = np.bincount(flat, minlength=vocab * vocab).reshape(vocab, vocab)
        self._first = self._joint.sum(1)
        second = self._joint.sum(0) + 1
        self._unigram = second / second.sum()


def corpus_pairs(packed: Packed) -> np.ndarray:
    """Neighbouring tokens `[2, n]` of a packed corpus, none across documents."""
    inside = np.ones(len(packed.tokens) - 1, bool)
    inside[packed.offsets[1:-1] - 1] = False
    return np.stack([packed.tokens[:-1][inside], packed.tokens[1:][inside]])


def target_pairs(batches: Iterable[Batch]) -> np.ndarray:
    """Token and next token `[2, n]` wherever a batch's target counts: what a language model is scored on."""
    parts = []
    for batch in batches:
        counted = batch["weights"] > 0
        parts.append(np.stack([batch["tokens"][counted], batch["targets"][counted]]))
    return np.concatenate(parts, 1)
