"""`modicum generate MODEL --prompt TEXT`: continue texts, as they come."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from ... import InputError

if TYPE_CHECKING:
    from ...models.generation import Sampling
    from .language_models import LanguageModel

NARROWING = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""Options that say from which tokens one is sampled, and where they leave all of them."""


@dataclass(frozen=True)
class Generate:
    """Continue one prompt, streaming, or every line of a file, together.

    MODEL is a published checkpoint (its folder or its name on the Hugging Face hub) or what `modicum train`
    left. The most probable token is taken unless --temperature is given.
    """

    model: tyro.conf.Positional[str]
    """A folder with config.json, safetensors and a tokenizer; a hub name; or a run of `modicum train`."""
    delta: Path | None = None
    """A delta folder, or a finished run of `modicum tune --target-column`, on this model."""
    prompt: str = ""
    """The text to continue; an encoder-decoder's input."""
    prompts: Path | None = None
    """A file with a prompt on each line, continued as one batch."""
    max_new_tokens: int = 64
    min_new_tokens: int = 0
    temperature: float = 0.0
    """0: the most probable token; 1: the model's own probabilities."""
    top_k: int = 0
    """Sample from the k most probable tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability."""
    min_p: float = 0.0
    """Sample from tokens at least this times as probable as the most probable."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that the text already has become less probable."""
    beams: int = 1
    """Search this many continuations at a time and print the best."""
    stop: tuple[str, ...] = ()
    """Texts after which to stop."""
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of a published checkpoint's parameters and arithmetic."""
    ignore: tuple[str, ...] = ()
    """Keys of a published config.json to pass over although nobody here knows them."""

    def run(self) -> int:
        """Print the continuations."""
        from .compilation import cache_compilations
        from .language_models import open_language_model, open_tuned

        texts = self._texts()
        self._check()
        sampling = self._sampling()
        cache_compilations()
        if self.delta is not None:
            speaker = open_tuned(self.model, self.delta, self.ignore)
        else:
            speaker = open_language_model(self.model, self.dtype, self.ignore)
        if speaker.reads_json:
            self._answer(speaker, texts)
        elif self.beams > 1:
            self._search(speaker, texts)
        elif len(texts) == 1 and self.prompts is None:
            self._stream(speaker, texts[0], sampling)
        else:
            self._batch(speaker, texts, sampling)
        return 0

    def _texts(self) -> list[str]:
        if (self.prompts is None) == (not self.prompt):
            raise InputError("give --prompt TEXT or --prompts FILE, one of them")
        if self.prompts is None:
            return [self.prompt]
        try:
            lines = [line for line in self.prompts.read_text("utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise InputError(f"{self.prompts} is not text in UTF-8: {error}") from error
        if not lines:
            raise InputError(f"{self.prompts} has no line of text; one prompt a line is valid")
        return lines

    def _check(self) -> None:
        if self.delta is not None and self.dtype != "float32":
            raise InputError(f"--delta belongs to parameters in float32: leave out --dtype {self.dtype}")
        if self.beams < 1:
            raise InputError(f"beams={self.beams} must be at least 1")
        narrowed = [name for name, all_of_them in NARROWING.items() if getattr(self, name) != all_of_them]
        if self.beams > 1 and (self.temperature or narrowed or self.stop):
            options = ", ".join(f"--{name.replace('_', '-')}" for name in ("temperature", *NARROWING))
            raise InputError(f"beams search the most probable text: leave out {options} and --stop")
        if narrowed and not self.temperature:
            given = f"{narrowed[0]}={getattr(self, narrowed[0])}"
            raise InputError(f"{given} narrows what is sampled from: give --temperature above 0 with it")

    def _sampling(self) -> Sampling:
        from ...models.generation import Sampling

        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)

    def _options(self, speaker: LanguageModel, sampling: Sampling) -> dict[str, Any]:
        import jax

        def text_of(ids: Sequence[int]) -> str:
            return speaker.tokenizer.decode(ids, special=True)  # --stop may name a special token

        return {
            "max_new_tokens": self.max_new_tokens,
            "min_new_tokens": self.min_new_tokens,
            "sampling": sampling,
            "rng": None if sampling.greedy else jax.random.key(self.seed),
            "stop_tokens": speaker.stops,
            "stop_sequences": self.stop,
            "text_of": text_of,
            "decoder_tokens": speaker.start,
        }

    def _stream(self, speaker: LanguageModel, text: str, sampling: Sampling) -> None:
        """Print each piece of text as it is complete; a note on the speed goes to who watches."""
        from ...models.generation import stream
        from ...models.pretrained.tokenizers import stream_text

        ids = encoded(speaker, [text])[0]
        clock = Clock()
        rows, more = speaker.prompts([ids])
        tokens = stream(speaker.model, speaker.params, rows[0], **more, **self._options(speaker, sampling))
        before = ids if speaker.start is None else []
        if before:
            print(text, end="", flush=True)
        for piece in stream_text(speaker.tokenizer, clock.count(tokens), before):
            print(piece, end="", flush=True)
        print()
        if sys.stderr.isatty():
            print(clock.note(len(ids)), file=sys.stderr)

    def _batch(self, speaker: LanguageModel, texts: Sequence[str], sampling: Sampling) -> None:
        from ...models.generation import generate

        prompts = encoded(speaker, texts)
        rows, more = speaker.prompts(prompts)
        made = generate(speaker.model, speaker.params, rows, **more, **self._options(speaker, sampling))
        for text, ids, row in zip(texts, prompts, made.rows()):
            show(speaker, text, ids, row)

    def _answer(self, speaker: LanguageModel, texts: Sequence[str]) -> None:
        """Print tasks in JSON with their answers in place, as CPM-Bee reads and writes them."""
        from ...models.pretrained.cpm import BeeTokenizer, answer

        assert isinstance(speaker.tokenizer, BeeTokenizer)
        if self.temperature or self.stop or self.min_new_tokens or self.repetition_penalty != 1:
            raise InputError(
                "CPM-Bee's answers are its likeliest: leave out --temperature, --stop, --min-new-tokens and "
                "--repetition-penalty"
            )
        answers = answer(
            speaker.model,
            speaker.params,
            speaker.tokenizer,
            [task(text) for text in texts],
            max_new_tokens=self.max_new_tokens,
            beams=self.beams,
        )
        for found in answers:
            print(json.dumps(found.data, ensure_ascii=False), flush=True)

    def _search(self, speaker: LanguageModel, texts: Sequence[str]) -> None:
        from ...models.generation import beam_search

        prompts = encoded(speaker, texts)
        rows, more = speaker.prompts(prompts)
        found = beam_search(
            speaker.model,
            speaker.params,
            rows,
            **more,
            beams=self.beams,
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            repetition_penalty=self.repetition_penalty,
            stop_tokens=speaker.stops,
            decoder_tokens=speaker.start,
        )
        for text, ids, tokens, lengths in zip(texts, prompts, found.tokens, found.lengths):
            show(speaker, text, ids, tokens[0, : lengths[0]])


def task(text: str) -> Any:
    """A prompt as JSON; raises `InputError` for one that is none."""
    try:
        return json.loads(text)
    except ValueError as error:
        example = '{"input": "...", "<ans>": ""}'
        raise InputError(
            f"prompt {text!r} is not JSON: {error}; CPM-Bee reads tasks such as {example}"
        ) from error


def encoded(speaker: LanguageModel, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each prompt; raises `InputError` for a text that has none."""
    rows = speaker.tokenizer.encode_all(texts, None, True)
    for text, row in zip(texts, rows):
        if not row:
            raise InputError(f"prompt {text!r} has no token of this model's vocabulary")
    return rows


def show(speaker: LanguageModel, text: str, ids: Sequence[int], row: Any) -> None:
    """One continuation on standard output, after its prompt where the model continued that."""
    from ...models.pretrained.tokenizers import stream_text

    pieces = stream_text(speaker.tokenizer, row, ids if speaker.start is None else ())
    print("".join([text if speaker.start is None else "", *pieces]), flush=True)


class Clock:
    """Times tokens that pass by."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.times: list[float] = []

    def count(self, tokens: Iterator[int]) -> Iterator[int]:
        """The same tokens."""
        for token in tokens:
            self.times.append(time.perf_counter())
            yield token

    def note(self, prompt: int) -> str:
        """How long the first token took, and how many a second came after it."""
        first = self.times[0] - self.begin
        rest, seconds = len(self.times) - 1, self.times[-1] - self.times[0]
        rate = f"{rest / seconds:.1f} tokens/s" if rest and seconds else "1 token"
        return f"{prompt} prompt tokens, first token after {first:.2f} s, then {rate}"
