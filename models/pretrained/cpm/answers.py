"""A CPM-Bee's answers to tasks in JSON: one after another, from one cache, written back into the JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .... import InputError
from ... import Transformer
from ...model import Params
from .bee import BeeTokenizer
from .sample import Sample, encode
from .tree import Json, with_answers
from .writing import Progress, Writer

RULED_OUT = -1e9  # of the beams that would repeat the first one


class Answered(NamedTuple):
    """A task with the answers in their places, and whether all of them came to their end."""

    data: dict[str, Any]
    finished: bool


def answer(
    model: Transformer,
    params: Params,
    tokenizer: BeeTokenizer,
    tasks: Sequence[Json],
    *,
    examples: Sequence[Sequence[Json]] = (),
    max_new_tokens: int = 100,
    beams: int = 1,
    length_penalty: float = 1.0,
) -> list[Answered]:
    """The tasks with the likeliest words in the places of their answers.

    Every string under the key `<ans>` is an answer; what stands there is replaced. `examples` are solved
    tasks for each task to see. For each task at most `max_new_tokens` words are written, the ends of answers
    among them: word by word the likeliest, or with several `beams` (upstream has 3) the likeliest answers
    as a whole, by log-probability over `length ** length_penalty`. An unknown word is written only where the
    task has one, and a numbered word only where it is the task's own.

    Raises `InputError` for no tasks, a task without a place for answers, and a model that is no CPM-Bee.
    """
    samples = _samples(model, tokenizer, tasks, examples)
    for name, value in (("max_new_tokens", max_new_tokens), ("beams", beams)):
        if value < 1:
            raise InputError(f"{name}={value}; at least 1 is valid")
    writer = Writer(model, params, tokenizer, samples, max_new_tokens, beams)
    if beams == 1:
        states = likeliest(writer, samples, max_new_tokens)
    else:
        states = search(writer, samples, max_new_tokens, beams, length_penalty)
    return [_answered(task, state, tokenizer) for task, state in zip(tasks, states)]


def _samples(
    model: Transformer, tokenizer: BeeTokenizer, tasks: Sequence[Json], examples: Sequence[Sequence[Json]]
) -> list[Sample]:
    if not tasks:
        raise InputError("tasks is empty; at least one is needed")
    if model.config.vocab != tokenizer.vocab_size:
        raise InputError(f"the model has {model.config.vocab} words, the tokenizer {tokenizer.vocab_size}")
    beside = list(examples) or [()] * len(tasks)
    if len(beside) != len(tasks):
        raise InputError(f"examples are for {len(beside)} tasks; there are {len(tasks)}")
    pairs = zip(tasks, beside)
    samples = [encode(task, tokenizer, examples=more, open_answers=True) for task, more in pairs]
    for number, sample in enumerate(samples):
        if not sample.open:
            raise InputError(f'tasks[{number}] has no string under "<ans>" to be answered')
    return samples


def _answered(task: Json, state: Progress, tokenizer: BeeTokenizer) -> Answered:
    sample, answers = state.sample, [*state.answers, *(() for _ in state.sample.open)]
    texts = {node.path: tokenizer.text(words, sample.names) for node, words in zip(sample.open, answers)}
    return Answered(with_answers(task, texts), state.finished)


def likeliest(writer: Writer, samples: Sequence[Sample], limit: int) -> list[Progress]:
    """Each answer by its likeliest next word, again and again."""
    states, end = [Progress(sample) for sample in samples], writer.tokenizer.vocabulary.ids["</s>"]
    for _ in range(limit):
        words, scores = writer.next(states, 1)
        states = [
            state if state.finished else state.add(word, state.score + float(score), end)
            for state, (word,), (score,) in zip(states, words, scores)
        ]
        if all(state.finished for state in states):
            break
    return states


def search(
    writer: Writer, samples: Sequence[Sample], limit: int, beams: int, length_penalty: float
) -> list[Progress]:
    """The likeliest answers among `beams` kept at each step (OpenBMB/CPM-Bee, `generation/bee.py`).

    A task's search is over when `beams` complete ones are no worse than the best running one would be if it
    ended now; with the last word all running ones count as complete.
    """
    end = writer.tokenizer.vocabulary.ids["</s>"]
    running = [[Progress(s, score=RULED_OUT if n else 0.0) for n in range(beams)] for s in samples]
    ended: list[list[Progress]] = [[] for _ in samples]
    over, order = [False] * len(samples), list(range(beams * len(samples)))

    def value(state: Progress) -> float:
        return state.score / max(1, state.length) ** length_penalty

    for step in range(limit):
        words, scores = writer.next([state for row in running for state in row], 2 * beams, order)
        for number, row in enumerate(running):
            first = number * beams
            candidates = [
                (place, state.add(word, state.score + float(gain), end))
                for place, state in enumerate(row, first)
                for word, gain in zip(words[place], scores[place])
            ]
            candidates = sorted(candidates, key=lambda pair: -pair[1].score)[: 2 * beams]
            best = candidates[0][1].score / max(1, step) ** length_penalty
            full = len(ended[number]) == beams and min(map(value, ended[number])) >= best
            over[number] = over[number] or full
            if over[number]:
                continue
            kept = []
            for place, state in candidates:
                if state.finished or step == limit - 1:
                    ended[number] = sorted([*ended[number], state], key=value, reverse=True)[:beams]
                else:
                    kept.append((place, state))
                if len(kept) == beams:  # what is less likely than these does not count, ended or not
                    break
            order[first : first + beams] = [place for place, _ in kept]
            running[number] = [state for _, state in kept]
        if all(over):
            break
    return [max(row, key=value) for row in ended]
