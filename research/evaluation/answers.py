"""What a model writes after prompts, beside what it should have written.

found = exact_match(model, params, rows, tokenizer.decode, stops=(tokenizer.eos,))
found.score, found.texts
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ...models.generation import generate
from ...models.model import Params
from ...models.transformer import Transformer
from ..data.completions import Completions

ROWS = 32


class Answers(NamedTuple):
    """The share of rows whose text is the answer, white space at both ends aside, and all texts written."""

    score: float
    texts: tuple[str, ...]


def exact_match(
    model: Transformer,
    params: Params,
    rows: Completions,
    decode: Callable[[Iterable[int]], str],
    *,
    stops: Sequence[int],
    batch: int = ROWS,
) -> Answers:
    """Continue every prompt greedily, by as many tokens as the longest answer has, and compare.

    `decode` turns ids into text without special tokens; `stops` end a row. Raises `InputError` for a model
    that cannot generate.
    """
    texts = [""] * len(rows)
    # Prompts of like lengths together: a batch is as wide as its longest.
    order = sorted(range(len(rows)), key=lambda row: len(rows.prompts[row]))
    for first in range(0, len(order), batch):
        for part in _fitting(model, rows, order[first : first + batch]):
            made = generate(
                model,
                params,
                [rows.prompts[row] for row in part],
                max_new_tokens=_longest(rows, part),
                stop_tokens=tuple(stops),
                decoder_tokens=rows.start,
            )
            for row, ids in zip(part, made.rows()):
                texts[row] = decode(ids)
    right = [text.strip() == answer.strip() for text, answer in zip(texts, rows.answers)]
    return Answers(sum(right) / len(right), tuple(texts))


def _longest(rows: Completions, part: Sequence[int]) -> int:
    return max(len(rows.completions[row]) for row in part)


def _fitting(model: Transformer, rows: Completions, part: list[int]) -> list[list[int]]:
    """The rows as one batch, or each for itself where the longest prompt and answer exceed the positions."""
    limit = model.config.positions.limit
    prompt = max(len(rows.prompts[row]) for row in part) if rows.start is None else 1
    if limit is None or prompt + _longest(rows, part) <= limit:
        return [part]
    return [[row] for row in part]
