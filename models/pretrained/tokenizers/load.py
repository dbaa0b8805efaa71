"""Finds a model's tokenizer among its files and reads what surrounds a text and which tokens are special."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers as hf

from .... import InputError
from ..files import locate
from . import fast
from .interface import SpecialTokens, Tokenizer
from .sentences import SentencePieceTokenizer, open_sentencepiece

ROLES = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")
SENTENCE_FILES = ("spiece.model", "tokenizer.model", "sentencepiece.model")
FILES = ("tokenizer.json", *SENTENCE_FILES, "vocab.json", "merges.txt", "vocab.txt", "ice_text.model")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")


@dataclass(frozen=True)
class Convention:
    """What a tokenizer class does where the files do not say: its special tokens and those around a text."""

    names: Mapping[str, str]
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    extra_ids: int = 0


_TEXT_END = "<|endoftext|>"
_ROBERTA = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>"}
CONVENTIONS = {
    "GPT2Tokenizer": Convention({"bos": _TEXT_END, "eos": _TEXT_END, "unk": _TEXT_END}),
    "RobertaTokenizer": Convention(
        {**_ROBERTA, "cls": "<s>", "sep": "</s>", "mask": "<mask>"}, ("cls",), ("sep",), ("sep", "sep")
    ),
    "BertTokenizer": Convention(
        {role: f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")},
        ("cls",),
        ("sep",),
        ("sep",),
    ),
    "T5Tokenizer": Convention({"eos": "</s>", "pad": "<pad>", "unk": "<unk>"}, (), ("eos",), extra_ids=100),
    "LlamaTokenizer": Convention({"bos": "<s>", "eos": "</s>", "unk": "<unk>"}, ("bos",)),
}
CLASSES = {
    "gpt2": "GPT2Tokenizer",
    "opt": "GPT2Tokenizer",
    "roberta": "RobertaTokenizer",
    "bert": "BertTokenizer",
    "t5": "T5Tokenizer",
    "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizer",
    "cpmant": "CpmAntTokenizer",
    "cpm-live-ant": "CpmAntTokenizer",
    "cpmbee": "CpmBeeTokenizer",
    "cpm-live-bee": "CpmBeeTokenizer",
    "chatglm": "ChatGLMTokenizer",
}
# Classes with code of their own here, and the files that they may lie in.
OWN = {
    "CpmAntTokenizer": ("vocab.txt", "ant.txt", "ant_plus.txt"),
    "CpmBeeTokenizer": ("vocab.txt", "bee.txt"),
    "ChatGLMTokenizer": ("ice_text.model",),
}
PAIRS = ("GPT2Tokenizer", "RobertaTokenizer")
PIECES = ("BertTokenizer",)
SENTENCES = ("T5Tokenizer", "LlamaTokenizer")


@dataclass(frozen=True)
class Folder:
    """A model's folder, what its settings say about the tokenizer, and the class they name, if any."""

    path: Path
    settings: Mapping[str, Any]
    kind: str

    @property
    def convention(self) -> Convention:
        """What the class does by itself; nothing for a class that is not known."""
        return CONVENTIONS.get(self.kind, Convention({}))

    def require_kind(self, file: str, valid: tuple[str, ...]) -> None:
        """Raise `InputError` where `file` alone does not tell how the class tokenizes."""
        if self.kind not in valid:
            found = f"tokenizer class {self.kind}" if self.kind else "no tokenizer class in its settings"
            reason = f"can be read for {', '.join(valid)}; another class needs a tokenizer.json"
            raise InputError(f"{self.path}: {found}, but {file} alone {reason}")

    def name(self, role: str) -> str | None:
        """The text of the token that plays `role` ("bos", "pad", ...), as the settings or the class say."""
        value = self.settings.get(f"{role}_token", self.convention.names.get(role))
        return value["content"] if isinstance(value, dict) else value

    def token(self, role: str) -> hf.AddedToken | None:
        """That token with how it takes in spaces beside it (RoBERTa's mask does on its left)."""
        value, name = self.settings.get(f"{role}_token"), self.name(role)
        options = value if isinstance(value, dict) else {}
        kept = {key: bool(options[key]) for key in ("lstrip", "rstrip", "single_word") if key in options}
        return None if name is None else hf.AddedToken(name, normalized=False, **kept)

    def surroundings(self) -> tuple[list[str], list[str]]:
        """The special tokens before and after every text."""
        sides: list[list[str]] = []
        for role, roles in (("bos", self.convention.before), ("eos", self.convention.after)):
            named = [self.name(each) for each in roles]
            asked = self.settings.get(f"add_{role}_token")
            # A class that puts other tokens there (BERT's [CLS]) does so whatever `add_bos_token` says.
            if asked is not None and set(roles) <= {role}:
                named = [self.name(role)] if asked else []
            sides.append([name for name in named if name is not None])
        return sides[0], sides[1]


def load_tokenizer(folder: str | Path, *, revision: str = "") -> Tokenizer:
    """The tokenizer of a model's folder, or of a model on the Hugging Face hub at a `revision`.

    Reads the first of these that is there: `tokenizer.json`; a sentencepiece model (T5, LLaMA);
    `vocab.json` with `merges.txt` (GPT-2, OPT, RoBERTa); `vocab.txt` (BERT). Special tokens are those of
    `tokenizer_config.json` and `special_tokens_map.json`. CPM-Ant, CPM-Bee and ChatGLM-6B have files of their
    own.

    Raises:
        InputError: where there is no such file, or one alone does not say how the model tokenizes, or a
            special token is named that has no id.
    """
    found = open_folder(_local(folder, revision))
    if found.kind in OWN:
        return _read_own(found)
    readers: tuple[tuple[tuple[str, ...], Callable[[Folder, Path], Tokenizer]], ...] = (
        (("tokenizer.json",), _read_tokenizer_json),
        *(((name,), _read_sentences) for name in SENTENCE_FILES),
        (("vocab.json", "merges.txt"), _read_pairs),
        (("vocab.txt",), _read_word_pieces),
    )
    for names, read in readers:
        if all((found.path / name).is_file() for name in names):
            return read(found, found.path / names[0])
    raise InputError(f"{found.path}: no tokenizer here; one of {', '.join(FILES)} is needed")


def _read_own(folder: Folder) -> Tokenizer:
    path = next((folder.path / name for name in OWN[folder.kind] if (folder.path / name).is_file()), None)
    if path is None:
        raise InputError(f"{folder.path}: no vocabulary here; one of {', '.join(OWN[folder.kind])} is needed")
    if folder.kind == "ChatGLMTokenizer":
        from .chatglm import ChatGLMTokenizer

        return ChatGLMTokenizer.read(path, int(folder.settings.get("num_image_tokens", 0)))
    from ..cpm import AntTokenizer, BeeTokenizer

    return AntTokenizer(path) if folder.kind == "CpmAntTokenizer" else BeeTokenizer(path)


def open_folder(path: Path) -> Folder:
    """The settings of a model's folder; `tokenizer_config.json` goes before `special_tokens_map.json`."""
    tokenizer = _json(path / "tokenizer_config.json")
    settings = {**_json(path / "special_tokens_map.json"), **tokenizer}
    added = {text: int(number) for text, number in _json(path / "added_tokens.json").items()}
    for number, token in tokenizer.get("added_tokens_decoder", {}).items():
        added[token["content"]] = int(number)
    kind = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    if kind not in CONVENTIONS:
        kind = CLASSES.get(_json(path / "config.json").get("model_type", ""), kind)
    return Folder(path, {**settings, "added": added}, kind)


def _local(folder: str | Path, revision: str) -> Path:
    path = locate(folder, revision, (*FILES, *SETTINGS))
    if not path.is_dir():
        raise InputError(f"{folder}: no such folder")
    return path


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: a {type(value).__name__}; an object is valid")
    return value


def _read_tokenizer_json(folder: Folder, path: Path) -> Tokenizer:
    inner = fast.from_tokenizer_json(path)
    asked = [folder.settings.get(f"add_{role}_token") for role in ("bos", "eos")]
    ours = {folder.name("bos"), folder.name("eos")}
    if any(each is not None for each in asked) and fast.surrounded_by(inner) <= ours:
        named = [[folder.name(role)] if add else [] for role, add in zip(("bos", "eos"), asked, strict=True)]
        before, after = ([name for name in side if name is not None] for side in named)
        fast.surround(inner, before, after)
        return _finish(folder, inner, pairs=False)
    return _finish(folder, inner, pairs=inner.num_special_tokens_to_add(True) > 0)


def _read_pairs(folder: Folder, path: Path) -> Tokenizer:
    folder.require_kind("vocab.json", PAIRS)
    return _surrounded(folder, fast.from_pairs(path, path.with_name("merges.txt"), folder.settings))


def _read_word_pieces(folder: Folder, path: Path) -> Tokenizer:
    folder.require_kind("vocab.txt", PIECES)
    return _surrounded(folder, fast.from_word_pieces(path, folder.settings))


def _surrounded(folder: Folder, inner: hf.Tokenizer) -> Tokenizer:
    for text, number in sorted(folder.settings["added"].items(), key=lambda item: item[1]):
        inner.add_tokens([hf.AddedToken(text, normalized=False)])
        if inner.token_to_id(text) != number:
            raise InputError(f"{folder.path}: added token {text!r} has id {number}, which leaves a gap")
    special = [token for role in ROLES if (token := folder.token(role)) is not None]
    inner.add_special_tokens([token for token in special if inner.token_to_id(token.content) is not None])
    before, after = folder.surroundings()
    if before or after:
        for name in (*before, *after):
            _require(folder, name, inner.token_to_id(name))
        between = [folder.name(role) or "" for role in folder.convention.between]
        fast.surround(inner, before, after, between)
    return _finish(folder, inner, pairs=bool(folder.convention.between))


def _finish(folder: Folder, inner: hf.Tokenizer, pairs: bool) -> Tokenizer:
    ids = {role: _id(folder, role, inner.token_to_id) for role in ("bos", "eos", "pad")}
    return fast.FastTokenizer(inner, _specials(ids, fast.special_ids(inner)), pairs)


def _read_sentences(folder: Folder, path: Path) -> Tokenizer:
    folder.require_kind(path.name, SENTENCES)
    inner = open_sentencepiece(path)
    size = inner.get_piece_size()
    control = {
        inner.id_to_piece(index): index
        for index in range(size)
        if inner.is_control(index) or inner.is_unknown(index)
    }
    extra = int(folder.settings.get("extra_ids", folder.convention.extra_ids))
    # T5 counts its sentinels down from the end of the vocabulary (Raffel et al., 2020, section 3.1.4).
    sentinels = {f"<extra_id_{index}>": size + extra - 1 - index for index in range(extra)}
    added = {**control, **sentinels, **folder.settings["added"]}

    def number(name: str) -> int | None:
        index = inner.piece_to_id(name)
        return added[name] if name in added else index if inner.id_to_piece(index) == name else None

    before, after = folder.surroundings()
    around = [tuple(_require(folder, name, number(name)) for name in side) for side in (before, after)]
    ids = {role: _id(folder, role, number) for role in ("bos", "eos", "pad")}
    specials = _specials(ids, frozenset((*control.values(), *sentinels.values(), *around[0], *around[1])))
    return SentencePieceTokenizer(inner, specials, added, around[0], around[1])


def _id(folder: Folder, role: str, number: Callable[[str], int | None]) -> int | None:
    """The id of the token that plays `role`; None where there is none."""
    name = folder.name(role)
    if name is None:
        return None
    return _require(folder, name, number(name)) if f"{role}_token" in folder.settings else number(name)


def _require(folder: Folder, name: str, number: int | None) -> int:
    if number is None:
        raise InputError(f"{folder.path}: the special token {name!r} has no id in the vocabulary")
    return number


def _specials(ids: Mapping[str, int | None], marked: frozenset[int]) -> SpecialTokens:
    bos, eos, pad = ids["bos"], ids["eos"], ids["pad"]
    fill = next((each for each in (pad, eos) if each is not None), 0)
    named = frozenset(each for each in (bos, eos, pad) if each is not None)
    return SpecialTokens(fill, bos, eos, marked | named)
