"""Models by path or name, published or what a command left: language models, and bodies to be tuned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import InputError

if TYPE_CHECKING:
    from ...models.model import Params
    from ...models.pretrained import Pretrained
    from ...models.pretrained.tokenizers import Tokenizer
    from ...models.transformer import Transformer
    from ...research.data.tokenizers import Tokenizer as OwnTokenizer
    from ...research.training.model_folder import TrainedModel


@dataclass(frozen=True)
class LanguageModel:
    """A model with its parameters and tokenizer.

    `stops` are the ids that end a text; `start` is the id that the decoder of an encoder-decoder starts with.
    `pretrained` is the published checkpoint, if it is one; `kept` is the tokenizer as model folders keep it.
    """

    model: Transformer
    params: Params
    tokenizer: Tokenizer
    stops: tuple[int, ...]
    start: int | None = None
    pretrained: Pretrained | None = None
    kept: OwnTokenizer | Path | None = None

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
    return file.is_file() and '"model_type"' in file.read_text("utf-8", "replace")


def is_own(path: str) -> bool:
    """Whether `path` is no published model: neither a folder with one nor what may be a name of the hub."""
    local = Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") > 1
    return local and not is_published(path)


def open_language_model(path: str, dtype: str, ignore: Sequence[str] = ()) -> LanguageModel:
    """The model at `path`, a folder of either kind, or published under that name.

    `ignore` are keys of a published config.json to pass over, as in `load_pretrained`.

    Raises `InputError` where no such model is, or none that continues texts.
    """
    from ...models.heads import ClassifierHead
    from ...research.training.model_folder import DESCRIPTION

    if not any((folder / DESCRIPTION).is_file() for folder in (Path(path), Path(path) / "model")):
        return _published(path, dtype, ignore)
    opened = open_own(path)
    if isinstance(opened.model.head, ClassifierHead):
        raise InputError(f"{path} holds a classifier; generating needs a language model")
    return opened


def open_body(path: str, ignore: Sequence[str] = ()) -> LanguageModel:
    """The model at `path` as what a classifier is put on; a published one without its own head.

    Of a published encoder-decoder it is the encoder. `stops` has the token that closes what a decoder reads.
    """
    from ...models.pretrained import load_pretrained
    from ...models.pretrained.t5 import encoder_of
    from ...models.pretrained.tokenizers import load_tokenizer

    if is_own(path):
        return _closed(open_own(path))
    pretrained = load_pretrained(path, head=None, ignore=ignore)
    require_plain_prompts(path, pretrained)
    tokenizer, model, params = load_tokenizer(pretrained.folder), pretrained.model, pretrained.params
    if model.config.kind == "encoder-decoder":
        model, params = encoder_of(model, params)
    opened = LanguageModel(model, params, tokenizer, (), None, pretrained, pretrained.folder)
    return _closed(opened)


def open_backbone(path: str, notes: Mapping[str, Any], ignore: Sequence[str] = ()) -> LanguageModel:
    """The model at `path` as a delta with these notes has it: a body, or a language model."""
    classifies = notes.get("kind", "classification") == "classification"
    return open_body(path, ignore) if classifies else open_language_model(path, "float32", ignore)


def open_tuned(path: str, delta: Path, ignore: Sequence[str] = ()) -> LanguageModel:
    """The model at `path` with a text-to-text delta of `modicum tune`.

    Raises `InputError` for a delta that classifies, and one of another backbone.
    """
    from ...research.delta import read_header
    from ...research.training.tuning import load_tuned

    folder = find_delta(delta)
    notes = read_header(folder).get("notes", {})
    if notes.get("kind") != "text-to-text":
        raise InputError(
            f"{folder} classifies: `modicum evaluate` measures it; generating needs text-to-text"
        )
    speaker = open_backbone(path, notes, ignore)
    model, params = load_tuned(folder, speaker.model, speaker.params).plain()
    return replace(speaker, model=model, params=params)


def find_delta(path: Path) -> Path:
    """The delta folder at `path`: itself, or the `delta` of a finished run."""
    from ...research.study.runs import METRICS

    for folder in (path, path / "delta"):
        if (folder / "delta.json").is_file():
            return folder
    if (path / "model" / "model.json").is_file():
        raise InputError(f"{path} holds a whole model, no delta: evaluate {path} itself, without --delta")
    if (path / METRICS).is_file():
        raise InputError(
            f"{path} is a run that was not finished: it was stopped, or other learning rates were better; "
            f"give the one that `modicum tune` called best"
        )
    raise InputError(f"{path} holds no delta.json; give a delta folder or a finished run of `modicum tune`")


def open_own(path: str) -> LanguageModel:
    """What a command left at `path`, whatever it ends in."""
    from ...research.training.model_folder import find_model, load_model

    trained = load_model(find_model(Path(path)))
    tokenizer, kept = _tokenizer(trained, Path(path))
    notes = {"stops": [tokenizer.eos], "start": None, **trained.notes}
    stops = tuple(each for each in notes["stops"] if each is not None)
    return LanguageModel(trained.model, trained.params, tokenizer, stops, notes["start"], kept=kept)


def require_plain_prompts(path: str, pretrained: Pretrained) -> None:
    """Raise `InputError` for models whose input is more than a text's tokens (CPM-Ant, CPM-Bee, ChatGLM)."""
    if pretrained.prepares:
        raise InputError(
            f"{path} holds a {pretrained.architecture}, which reads a text behind a prompt of its own; "
            f"`modicum tune` takes models that read plain texts"
        )


def _closed(opened: LanguageModel) -> LanguageModel:
    end = opened.tokenizer.eos if opened.model.config.kind == "decoder" else None
    return opened if end is None else replace(opened, stops=(end,))


def _tokenizer(trained: TrainedModel, path: Path) -> tuple[Tokenizer, OwnTokenizer | Path]:
    """The tokenizer of a model of ours, and as its folder keeps it."""
    from ...models.pretrained import tokenizers
    from ...models.pretrained.tokenizers.fast import FastTokenizer
    from ...research.training.model_folder import load_tokenizer

    if trained.tokenizer is not None and trained.tokenizer.is_dir():
        return tokenizers.load_tokenizer(trained.tokenizer), trained.tokenizer
    own = load_tokenizer(trained, path)
    special = tokenizers.SpecialTokens(own.pad, None, own.eos, frozenset((own.pad, own.eos)))
    return FastTokenizer(own.inner, special), own


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
    model, params = pretrained.model, pretrained.params
    return LanguageModel(model, params, tokenizer, ends, start, pretrained, pretrained.folder)


def _generation_settings(folder: Path) -> dict[str, Any]:
    """What `generation_config.json` says, where there is one; it goes before config.json."""
    from ...models.pretrained.files import read_json

    file = folder / "generation_config.json"
    return read_json(file) if file.is_file() else {}
