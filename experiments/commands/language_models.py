"""A language model to generate with: a published checkpoint, or what `modicum train` left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import InputError

if TYPE_CHECKING:
    from ...models.model import Params
    from ...models.pretrained import Pretrained
    from ...models.pretrained.tokenizers import Tokenizer
    from ...models.transformer import Transformer


@dataclass(frozen=True)
class LanguageModel:
    """A model with its parameters and tokenizer.

    `stops` are the ids that end a text; `start` is the id that the decoder of an encoder-decoder starts with.
    `pretrained` is the published checkpoint, if it is one.
    """

    model: Transformer
    params: Params
    tokenizer: Tokenizer
    stops: tuple[int, ...]
    start: int | None = None
    pretrained: Pretrained | None = None

    @property
    def reads_json(self) -> bool:
        """Whether its prompts are tasks in JSON, and no texts to be continued."""
        from ...models.pretrained.cpm import BeeTokenizer

        return isinstance(self.tokenizer, BeeTokenizer)

    def prompts(self, rows: list[list[int]]) -> tuple[Any, dict[str, Any]]:
        """Tokens for `generate` and what else it is to be given of them (CPM-Ant, ChatGLM)."""
        prepared = None if self.pretrained is None else self.pretrained.prepare(rows)
        if prepared is None:
            return rows, {}
        return prepared.tokens, {"segments": prepared.segments, "inputs": prepared.inputs}


def is_published(path: str) -> bool:
    """Whether a folder holds a published checkpoint: runs of ours have a `config.json` of another kind."""
    file = Path(path) / "config.json"
    return file.is_file() and '"model_type"' in file.read_text("utf-8")


def open_language_model(path: str, dtype: str, ignore: Sequence[str] = ()) -> LanguageModel:
    """The model at `path`, a folder of either kind, or published under that name.

    `ignore` are keys of a published config.json to pass over, as in `load_pretrained`.

    Raises `InputError` where no such model is, or none that continues texts.
    """
    from ...research.training.model_folder import DESCRIPTION

    if any((folder / DESCRIPTION).is_file() for folder in (Path(path), Path(path) / "model")):
        return _trained(Path(path))
    return _published(path, dtype, ignore)


def _trained(path: Path) -> LanguageModel:
    from ...models.pretrained.tokenizers import SpecialTokens
    from ...models.pretrained.tokenizers.fast import FastTokenizer
    from ...research.training.model_folder import find_model, load_model, load_tokenizer

    trained = load_model(find_model(path))
    if trained.labels:
        raise InputError(f"{path} holds a classifier; generating needs a language model")
    own = load_tokenizer(trained, path)
    special = SpecialTokens(own.pad, None, own.eos, frozenset((own.pad, own.eos)))
    return LanguageModel(trained.model, trained.params, FastTokenizer(own.inner, special), (own.eos,))


def _published(path: str, dtype: str, ignore: Sequence[str]) -> LanguageModel:
    from ...models.heads import LanguageModelHead
    from ...models.pretrained import load_pretrained
    from ...models.pretrained.tokenizers import load_tokenizer

    pretrained = load_pretrained(path, dtype=dtype, ignore=ignore)
    if not isinstance(pretrained.model.head, LanguageModelHead):
        raise InputError(f"{path} holds a {pretrained.architecture}; generating needs a language model")
    tokenizer = load_tokenizer(pretrained.folder)
    told: dict[str, Any] = {"eos_token_id": tokenizer.eos}
    for settings in (pretrained.settings, _generation_settings(pretrained.folder)):
        told |= {key: value for key, value in settings.items() if value is not None}
    stops = told["eos_token_id"]
    ends = () if stops is None else tuple(stops) if isinstance(stops, list) else (stops,)
    both = pretrained.model.config.kind == "encoder-decoder"
    start = told.get("decoder_start_token_id") if both else None
    if both and start is None:
        raise InputError(f"{path}: config.json has no decoder_start_token_id, with which its decoder begins")
    return LanguageModel(pretrained.model, pretrained.params, tokenizer, ends, start, pretrained)


def _generation_settings(folder: Path) -> dict[str, Any]:
    """What `generation_config.json` says, where there is one; it goes before config.json."""
    from ...models.pretrained.files import read_json

    file = folder / "generation_config.json"
    return read_json(file) if file.is_file() else {}
