"""A task as tokens: ids, numbers among words of one name, segments, and what is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .bee import BeeTokenizer, Names, Word
from .tree import Json, Node, nodes_of, relations_of


@dataclass(frozen=True)
class Sample:
    """One task, followed by its examples, as arrays `[n]`.

    `ids` and `sub` are the words; `context` is whether a token is given; `segment` is the number of the
    token's segment in its tree and `tree` that of the tree, 0 the task itself and 1, 2, ... examples.
    `relations` has a table for each tree. `names` are the words that the vocabulary lacks. Where the answers
    are left open, `open` are their segments, in the order in which they are to be given.
    """

    ids: np.ndarray
    sub: np.ndarray
    context: np.ndarray
    segment: np.ndarray
    tree: np.ndarray
    relations: tuple[np.ndarray, ...]
    names: Names
    open: tuple[Node, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


def encode(
    data: Json,
    tokenizer: BeeTokenizer,
    *,
    examples: Sequence[Json] = (),
    rng: np.random.Generator | None = None,
    open_answers: bool = False,
) -> Sample:
    """The tokens of a task and, for it to see, of solved `examples`.

    A segment is `<s>`, its words and, unless it is predicted, `</s>`. `rng` shuffles the order of several
    answers, as in training; `open_answers` leaves them out, to be generated. Raises `InputError` for
    values that are neither strings nor objects and for text that the tokenizer cannot read.
    """
    names, parts, tables = Names(), [], []
    left: tuple[Node, ...] = ()
    for number, each in enumerate((data, *examples)):
        nodes = nodes_of(each, rng)
        tables.append(relations_of(nodes))
        if number == 0 and open_answers:
            left = tuple(node for node in nodes if node.predicted)
            nodes = [node for node in nodes if not node.predicted]
        parts += [_tokens(node, number, tokenizer, names) for node in nodes]
    columns = np.concatenate(parts, axis=1).astype(np.int32)
    ids, sub, context, segment, tree = columns
    return Sample(ids, sub, context > 0, segment, tree, tuple(tables), names, left)


def _tokens(node: Node, tree: int, tokenizer: BeeTokenizer, names: Names) -> np.ndarray:
    """Rows ids, sub, context, segment and tree of one segment's tokens."""
    ids = tokenizer.vocabulary.ids
    words = [Word(ids["<s>"]), *tokenizer.words(node.text, names)]
    words += [] if node.predicted else [Word(ids["</s>"])]
    given = tree > 0 or not node.predicted
    rows = [[word.id for word in words], [word.sub for word in words]]
    return np.array([*rows, *([value] * len(words) for value in (given, node.number, tree))])


def targets(sample: Sample, extra: dict[Word, int], vocab: int, begin: int, end: int) -> np.ndarray:
    """What each token predicts, int32 `[n]`: its successor where it is not given itself, else -100 (nothing).

    The last token of an answer predicts `end`. Numbered words have the ids that `extra` gives them, from
    `vocab` on. `begin` and `end` are the ids of `<s>` and `</s>`.
    """
    words = [Word(int(id), int(sub)) for id, sub in zip(sample.ids, sample.sub)]
    own = np.array([vocab + extra[word] if word.sub else word.id for word in words], np.int32)
    following = np.append(own[1:], end)
    following = np.where(following == begin, end, following)
    # upstream starts at j > 1, so that token 0, the root's <s>, never predicts; it is given anyway
    return np.where(sample.context, -100, following).astype(np.int32)
