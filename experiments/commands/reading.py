"""What of a data set is read, and how it becomes a model's rows: classification or text-to-text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from ... import InputError

if TYPE_CHECKING:
    from ...research.data.completions import Completions
    from ...research.data.examples import Examples, Labels
    from ...research.data.sources import Source
    from .language_models import LanguageModel

Kind = Literal["classification", "text-to-text"]


@dataclass(frozen=True)
class Reading:
    """The columns that are read; what a delta was tuned with is stored with it, and read again."""

    text_column: str = "text"
    pair_column: str = ""
    prompt: str = ""
    label_column: str = "label"
    target_column: str = ""

    def __post_init__(self) -> None:
        if self.prompt and self.pair_column:
            raise InputError(
                f"--prompt names the columns it is made of: leave out --pair-column {self.pair_column}"
            )
        if self.target_column and self.pair_column:
            raise InputError(
                f"--target-column has the model answer one text: join both by --prompt, such as "
                f"'{{{self.text_column}}} {{{self.pair_column}}}', and leave out --pair-column"
            )

    @classmethod
    def of(cls, notes: Mapping[str, Any], **changes: str) -> Reading:
        """What `notes` say, with those of `changes` that are not empty."""
        stored = notes.get("reading", {})
        if strange := sorted(set(stored) - {each.name for each in fields(cls)}):
            raise InputError(
                f"the notes of what was tuned have reading={strange[0]!r}, which nobody here knows"
            )
        return cls(**{**stored, **{name: text for name, text in changes.items() if text}})

    @property
    def kind(self) -> Kind:
        """Text-to-text where there is a column of targets."""
        return "text-to-text" if self.target_column else "classification"

    def splits(self, data: str) -> dict[str, Source]:
        """The splits of `data`, checked for these columns."""
        from ...research.data.sources import load_splits
        from ...research.data.templates import Template

        first = Template(self.prompt).columns[0] if self.prompt else self.text_column
        found = load_splits(data, first, None if self.target_column else self.label_column)
        for source in found.values():
            for column in self._further():
                source.texts_in(column)
        return found

    def rows(
        self,
        source: Source,
        speaker: LanguageModel,
        labels: Labels | None,
        length: int | None,
        truncate: bool,
    ) -> Examples | Completions:
        """The rows of one split, of at most `length` tokens, in the model's own tokens."""
        from ...research.data.completions import encode_completions
        from ...research.data.encoded import encode_examples

        end = speaker.stops[0] if speaker.stops else None
        if labels is None:
            return encode_completions(
                source,
                speaker.tokenizer,
                length,
                target_column=self.target_column,
                template=self.prompt,
                end=end,
                start=speaker.start,
                truncate=truncate,
            )
        return encode_examples(
            source,
            speaker.tokenizer,
            labels,
            length,
            pair_column=self.pair_column or None,
            template=self.prompt,
            end=end,
            token_types=speaker.model.config.token_types > 1,
            truncate=truncate,
        )

    def _further(self) -> list[str]:
        from ...research.data.templates import Template

        named = list(Template(self.prompt).columns) if self.prompt else [self.pair_column]
        return [column for column in (*named, self.target_column) if column]


def longest(speaker: LanguageModel, asked: int) -> int | None:
    """The longest text in tokens: what is asked for, or as many as there are positions; None: no limit."""
    if asked < 0:
        raise InputError(f"length={asked} must be at least 1, or 0 for as many as the model has positions")
    positions = speaker.model.config.positions
    positions.require(asked)
    return asked or positions.limit


def alike(rows: Mapping[str, Any], asked: int) -> dict[str, Any]:
    """Splits padded to one length, so that one program serves them: to `asked`, 0: to their longest row."""
    from ...research.data.completions import Completions, same_lengths
    from ...research.data.encoded import same_length

    if all(isinstance(each, Completions) for each in rows.values()):
        return dict(same_lengths(rows))
    return dict(same_length(rows, asked or None))


def exactly_answered(
    rows: Any, speaker: LanguageModel, plain: Callable[[], tuple[Any, Any]]
) -> dict[str, float]:
    """The share of texts that are answered exactly, as a measurement; nothing where the model classifies.

    `plain()` is the tuned model with its parameters, as `generate` takes them.
    """
    from ...research.data.completions import Completions
    from ...research.evaluation.answers import exact_match

    if not isinstance(rows, Completions):
        return {}
    found = exact_match(*plain(), rows, speaker.tokenizer.decode, stops=speaker.stops)
    return {"exact_match": found.score}
