"""A CPM-Bee's answers to tasks in JSON: one after another, from one cache, written back into the JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .... import InputError
from ... import Cache, ExtraWords, Transformer, TreePositions
from ...generation.buckets import bucket
from ...model import Params
from .batch import extra_words, left_padded
from .bee import BeeTokenizer, Word
from .sample import Sample, encode
from .tree import Json, with_answers

EXCLUDED = -10_000.0  # the score of what must not be chosen


class Answered(NamedTuple):
    """A task with the answers in their places, and whether all of them came to their end."""

    data: dict[str, Any]
    finished: bool


@dataclass
class _Row:
    """How far the answers of one task are: their words, and how many the present one has so far."""

    sample: Sample
    answers: list[list[Word]] = field(default_factory=lambda: [[]])
    index: int = 0

    @property
    def finished(self) -> bool:
        return len(self.answers) > len(self.sample.open)

    @property
    def segment(self) -> int:
        return 0 if self.finished else self.sample.open[len(self.answers) - 1].number

    def add(self, word: Word, end: int) -> None:
        """Go on by the word that the model chose, `</s>` being the end of an answer."""
        if word == Word(end):
            self.answers.append([])
            self.index = 0
        else:
            self.answers[-1].append(word)
            self.index += 1


def answer(
    model: Transformer,
    params: Params,
    tokenizer: BeeTokenizer,
    tasks: Sequence[Json],
    *,
    examples: Sequence[Sequence[Json]] = (),
    max_new_tokens: int = 100,
) -> list[Answered]:
    """The tasks with the likeliest words in the places of their answers, word by word.

    Every string under the key `<ans>` is an answer; what stands there is replaced. `examples` are solved
    tasks for each task to see. For each task at most `max_new_tokens` words are written, the ends of answers
    among them. An unknown word is written only where the task has one, and a numbered word only where it is
    the task's own.

    Raises `InputError` for no tasks, a task without a place for answers, and a model that is no CPM-Bee.
    """
    if not tasks:
        raise InputError("tasks is empty; at least one is needed")
    if model.config.vocab != tokenizer.vocab_size:
        raise InputError(f"the model has {model.config.vocab} words, the tokenizer {tokenizer.vocab_size}")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens}; at least 1 is valid")
    beside = list(examples) or [()] * len(tasks)
    if len(beside) != len(tasks):
        raise InputError(f"examples are for {len(beside)} tasks; there are {len(tasks)}")
    pairs = zip(tasks, beside)
    rows = [_Row(encode(task, tokenizer, examples=more, open_answers=True)) for task, more in pairs]
    for number, row in enumerate(rows):
        if not row.sample.open:
            raise InputError(f'tasks[{number}] has no string under "<ans>" to be answered')
    _write(model, params, tokenizer, rows, max_new_tokens)
    return [_answered(task, row, tokenizer) for task, row in zip(tasks, rows)]


def _answered(task: Json, row: _Row, tokenizer: BeeTokenizer) -> Answered:
    names, answers = row.sample.names, [*row.answers, *([] for _ in row.sample.open)]
    texts = {node.path: tokenizer.text(words, names) for node, words in zip(row.sample.open, answers)}
    return Answered(with_answers(task, texts), row.finished)


def _write(model: Transformer, params: Params, tokenizer: BeeTokenizer, rows: list[_Row], limit: int) -> None:
    """Write all rows' answers, a word of each at a time; shapes are rounded up, so that few are compiled."""
    samples, ids = [row.sample for row in rows], tokenizer.vocabulary.ids
    words = list(extra_words(samples))
    width, extra = bucket(max(map(len, samples)), 16), bucket(max(1, len(words)))
    nodes = bucket(max(len(table) for sample in samples for table in sample.relations), 16)
    batch = left_padded(samples, tokenizer, width, extra, nodes)
    excluded = _excluded(rows, words, extra, tokenizer)
    relations = np.zeros((len(rows), nodes, nodes), np.int32)
    for own, sample in zip(relations, samples):
        own[: len(sample.relations[0]), : len(sample.relations[0])] = sample.relations[0]
    # the group of each task, to which its answers belong
    groups = np.array([group[main].min() for group, main in zip(batch.positions.group, batch.main)])
    cache = _read(model, params, batch.tokens, batch.arguments, bucket(width + limit, 16))
    latest = [Word(ids["<s>"])] * len(rows)
    for _ in range(limit):
        live = np.array([not row.finished for row in rows])
        positions = _positions(rows, latest, relations, groups)
        tokens = np.array([[word.id] for word in latest], np.int32)
        chosen, cache = _step(
            model, params, tokens, live[:, None].astype(np.int32), positions, batch.extra, excluded, cache
        )
        latest = [
            _word(int(token), tokenizer.vocab_size, words) if alive else Word(0)
            for token, alive in zip(np.asarray(chosen), live)
        ]
        for row, word, alive in zip(rows, latest, live):
            if alive:
                row.add(word, ids["</s>"])
        if all(row.finished for row in rows):
            return
        latest = [Word(ids["<s>"]) if row.index == 0 else word for row, word in zip(rows, latest)]


def _word(token: int, vocab: int, words: list[Word]) -> Word:
    return Word(token) if token < vocab else words[token - vocab]


def _positions(
    rows: list[_Row], latest: list[Word], relations: np.ndarray, groups: np.ndarray
) -> TreePositions:
    """Of one token a row: the index counts within its answer."""
    segments = np.array([row.segment for row in rows])
    each = {
        "index": np.array([row.index for row in rows], np.int32),
        "segment": segments.astype(np.int32),
        "group": groups.astype(np.int32),
        "relations": relations[np.arange(len(rows)), segments],
        "sub": np.array([word.sub for word in latest], np.int32),
    }
    return TreePositions(**{name: values[:, None] for name, values in each.items()})


def _excluded(rows: list[_Row], words: list[Word], extra: int, tokenizer: BeeTokenizer) -> np.ndarray:
    """What is added to the logits `[B, V + N]`: words of other tasks, and `<unk>` where a task has none."""
    vocab, unknown = tokenizer.vocab_size, tokenizer.vocabulary.ids["<unk>"]
    added = np.zeros((len(rows), vocab + extra), np.float32)
    for number, row in enumerate(rows):
        own = set(row.sample.names.words.values())
        foreign = [index for index in range(extra) if index >= len(words) or words[index] not in own]
        added[number, [vocab + index for index in foreign]] = EXCLUDED
        added[number, unknown] = 0.0 if any(word.id == unknown for word in own) else EXCLUDED
    return added


@partial(jax.jit, static_argnames=("model", "capacity"))
def _read(
    model: Transformer, params: Params, tokens: jax.Array, arguments: Mapping[str, Any], capacity: int
) -> Cache:
    """The cache of the given text of all rows."""
    cache = Cache.empty(tokens.shape[0], capacity)
    return model.apply(params, tokens, cache=cache, last=True, **arguments)[1]


@partial(jax.jit, static_argnames=("model",), donate_argnames=("cache",))
def _step(
    model: Transformer,
    params: Params,
    tokens: jax.Array,
    segments: jax.Array,
    positions: TreePositions,
    extra: ExtraWords,
    excluded: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """The likeliest next token of each row, int32 `[B]`; extra words count from the vocabulary's size on."""
    given: dict[str, Any] = {"segments": segments, "positions": positions, "extra": extra}
    logits, cache = model.apply(params, tokens, cache=cache, last=True, **given)
    return jnp.argmax(logits[:, -1] + excluded, -1).astype(jnp.int32), cache
