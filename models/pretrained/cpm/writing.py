"""Answers in the making: how far each is, and the model that scores the next word of all of them at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ... import Cache, ExtraWords, Transformer, TreePositions
from ...generation.buckets import bucket
from ...model import Params
from .batch import extra_words, left_padded
from .bee import BeeTokenizer, Word
from .sample import Sample

EXCLUDED = -10_000.0  # the score of what must not be chosen


@dataclass(frozen=True)
class Progress:
    """The answers to one task so far, the last of them perhaps incomplete, and their log-probability."""

    sample: Sample
    answers: tuple[tuple[Word, ...], ...] = ((),)
    score: float = 0.0

    @property
    def finished(self) -> bool:
        """Whether every answer has come to its end."""
        return len(self.answers) > len(self.sample.open)

    @property
    def length(self) -> int:
        """How many words were written, the ends of answers among them."""
        return sum(map(len, self.answers)) + len(self.answers) - 1

    @property
    def segment(self) -> int:
        """The segment of the present answer."""
        return 0 if self.finished else self.sample.open[len(self.answers) - 1].number

    def add(self, word: Word, score: float, end: int) -> Progress:
        """One word further, `end` being the id that ends an answer; `score` is the whole's then."""
        if word == Word(end):
            return replace(self, answers=(*self.answers, ()), score=score)
        return replace(self, answers=(*self.answers[:-1], (*self.answers[-1], word)), score=score)


class Writer:
    """A model that has read the tasks of some samples, and scores words to come.

    An unknown word can be written only where a task has one, a numbered word only where it is the task's.
    Shapes are rounded up, so that few programs are compiled.
    """

    def __init__(
        self,
        model: Transformer,
        params: Params,
        tokenizer: BeeTokenizer,
        samples: Sequence[Sample],
        limit: int,
        copies: int = 1,
    ) -> None:
        """Reads the tasks; each has `copies` rows, one after another, for at most `limit` words."""
        self.model, self.params, self.tokenizer = model, params, tokenizer
        width, extra = bucket(max(map(len, samples)), 16), bucket(max(1, len(extra_words(samples))))
        nodes = bucket(max(len(table) for sample in samples for table in sample.relations), 16)
        batch = left_padded(samples, tokenizer, width, extra, nodes)
        self.extra = batch.extra
        self.words = [Word(int(id), int(sub)) for id, sub in zip(batch.extra.words, batch.extra.sub)]
        relations = np.zeros((len(samples), nodes, nodes), np.int32)
        for own, sample in zip(relations, samples):
            own[: len(sample.relations[0]), : len(sample.relations[0])] = sample.relations[0]
        self.relations = relations.repeat(copies, 0)
        self.excluded = self._excluded(samples, extra).repeat(copies, 0)
        # the group of each task, to which its answers belong
        groups = [group[main].min() for group, main in zip(np.asarray(batch.positions.group), batch.main)]
        self.groups = np.array(groups, np.int32).repeat(copies)
        cache = _read(model, params, batch.tokens, batch.arguments, bucket(width + limit, 16))
        self.cache = cache.repeat(copies) if copies > 1 else cache

    def next(
        self, states: Sequence[Progress], count: int, order: Sequence[int] | None = None
    ) -> tuple[list[list[Word]], np.ndarray]:
        """For each row the `count` likeliest next words and their log-probabilities `[rows, count]`.

        Before, row i becomes the former row `order[i]`.
        """
        begin = Word(self.tokenizer.vocabulary.ids["<s>"])
        latest = [state.answers[-1][-1] if state.answers[-1] else begin for state in states]
        live = np.array([[not state.finished] for state in states], np.int32)
        scores, ids, self.cache = _step(
            self.model,
            self.params,
            np.array([[word.id] for word in latest], np.int32),
            live,
            self._positions(states, latest),
            self.extra,
            self.excluded,
            self.cache,
            None if order is None else np.asarray(order, np.int32),
            count=count,
        )
        return [[self._word(int(number)) for number in row] for row in np.asarray(ids)], np.asarray(scores)

    def _word(self, number: int) -> Word:
        vocab = self.tokenizer.vocab_size
        return Word(number) if number < vocab else self.words[number - vocab]

    def _positions(self, states: Sequence[Progress], latest: Sequence[Word]) -> TreePositions:
        """Of one token a row: the index counts within its answer."""
        segments = np.array([state.segment for state in states], np.int32)
        each = {
            "index": np.array([len(state.answers[-1]) for state in states], np.int32),
            "segment": segments,
            "group": self.groups,
            "relations": self.relations[np.arange(len(states)), segments],
            "sub": np.array([word.sub for word in latest], np.int32),
        }
        return TreePositions(**{name: values[:, None] for name, values in each.items()})  # type: ignore[arg-type]

    def _excluded(self, samples: Sequence[Sample], extra: int) -> np.ndarray:
        """What is added to the logits `[B, V + N]`."""
        vocab, unknown = self.tokenizer.vocab_size, self.tokenizer.vocabulary.ids["<unk>"]
        added = np.full((len(samples), vocab + extra), EXCLUDED, np.float32)
        added[:, :vocab] = 0.0
        for row, sample in zip(added, samples):
            own = set(sample.names.words.values())
            row[[vocab + place for place, word in enumerate(self.words) if word in own]] = 0.0
            row[unknown] = 0.0 if any(word.id == unknown for word in own) else EXCLUDED
        return added


@partial(jax.jit, static_argnames=("model", "capacity"))
def _read(
    model: Transformer, params: Params, tokens: jax.Array, arguments: Mapping[str, Any], capacity: int
) -> Cache:
    """The cache of the given text of all rows."""
    cache = Cache.empty(tokens.shape[0], capacity)
    return model.apply(params, tokens, cache=cache, last=True, **arguments)[1]


@partial(jax.jit, static_argnames=("model", "count"), donate_argnames=("cache",))
def _step(
    model: Transformer,
    params: Params,
    tokens: jax.Array,
    segments: jax.Array,
    positions: TreePositions,
    extra: ExtraWords,
    excluded: jax.Array,
    cache: Cache,
    order: jax.Array | None,
    *,
    count: int,
) -> tuple[jax.Array, jax.Array, Cache]:
    """Log-probabilities and ids `[B, count]` of the next tokens; extra words count from the vocabulary on."""
    cache = cache if order is None else cache.rows(order)
    given: dict[str, Any] = {"segments": segments, "positions": positions, "extra": extra}
    logits, cache = model.apply(params, tokens, cache=cache, last=True, **given)
    scores = jax.nn.log_softmax(logits[:, -1] + excluded)
    best, ids = jax.lax.top_k(scores, min(count, scores.shape[-1]))
    return best, ids.astype(jnp.int32), cache
