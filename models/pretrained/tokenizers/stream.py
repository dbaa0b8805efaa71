"""Text as it is generated: ids in, pieces of text out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from .interface import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 8  # tokens of a text before: more than one character's bytes


class TextStream:
    """Turns ids that arrive one by one into pieces of text whose concatenation is the decoded whole.

    A character may be spread over several tokens: its piece is held back until it is complete. What a
    token reads like depends on the one before it (a leading space), so that each piece is the difference
    of two decodings of a short window, not of the whole text. `before` are the ids of a text that the pieces
    continue: without them LLaMA's and T5's tokenizers decode a first word without the space before it.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        shown = [int(token) for token in before if int(token) not in tokenizer.tokens.all]
        self._window = shown[-CONTEXT:]
        self._shown = len(self._window)

    def push(self, token: int) -> str:
        """The text that `token` completes; empty for special tokens and unfinished characters."""
        if int(token) in self._tokenizer.tokens.all:
            return ""
        self._window.append(int(token))
        whole = self._tokenizer.decode(self._window)
        if whole.endswith(UNFINISHED):
            return ""
        return self._advance(whole)

    def finish(self) -> str:
        """What was held back; an unfinished character comes out as the replacement character."""
        return self._advance(self._tokenizer.decode(self._window))

    def _advance(self, whole: str) -> str:
        piece = whole[len(self._tokenizer.decode(self._window[: self._shown])) :]
        if piece:
            latest = self._window[self._shown :]
            # Spaces at the beginning of a window may decode to nothing: they are no context for the next.
            if self._tokenizer.decode(latest).strip():
                self._window = latest
            self._shown = len(self._window)
        return piece


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
    """The non-empty pieces of text of a sequence of ids, as soon as each is complete; `before` as above."""
    stream = TextStream(tokenizer, before)
    for token in tokens:
        if piece := stream.push(token):
            yield piece
    if piece := stream.finish():
        yield piece
