"""Tokenizers that the `tokenizers` library runs: its own files, byte-level pairs and word pieces."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers as hf

from .... import InputError
from .interface import SpecialTokens, Tokenizer, check_limit, share


@dataclass(frozen=True)
class FastTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer`, the ids of its special tokens, and whether it has a form for pairs."""

    inner: hf.Tokenizer
    tokens: SpecialTokens
    pairs: bool = False

    @property
    def vocab_size(self) -> int:
        """How many ids there are, added tokens included."""
        return self.inner.get_vocab_size()

    def encode_all(self, texts: Sequence[str], limit: int | None, special: bool) -> list[list[int]]:
        """The ids of each text, on all cores; text is dropped at its end, special tokens stay."""
        if limit is None:
            encoded = self.inner.encode_batch(list(texts), add_special_tokens=special)
            return [each.ids for each in encoded]
        added = self.inner.num_special_tokens_to_add(False) if special else 0
        check_limit(limit, added)
        bodies = self.inner.encode_batch(list(texts), add_special_tokens=False)
        for body in bodies:
            body.truncate(limit - added)
        return [self.inner.post_process(body, add_special_tokens=special).ids for body in bodies]

    def encode_pair(self, first: str, second: str, limit: int | None) -> tuple[list[int], list[int]]:
        """The ids of two texts as one input, and for each whose it is."""
        if not self.pairs:
            return super().encode_pair(first, second, limit)
        added = self.inner.num_special_tokens_to_add(True)
        check_limit(limit, added + 1)
        one, two = self.inner.encode_batch([first, second], add_special_tokens=False)
        kept = share(len(one.ids), len(two.ids), None if limit is None else limit - added)
        one.truncate(kept[0])
        two.truncate(kept[1])
        both = self.inner.post_process(one, two)
        return both.ids, both.type_ids

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of some ids."""
        return self.inner.decode([int(each) for each in ids], skip_special_tokens=not special)


def from_tokenizer_json(path: Path) -> hf.Tokenizer:
    """The tokenizer of a `tokenizer.json`, without the file's own padding and truncation."""
    try:
        inner = hf.Tokenizer.from_str(path.read_text("utf-8"))
    except Exception as error:  # the library raises bare Exception
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"{path}: not a tokenizer.json: {reason}") from error
    inner.no_padding()
    inner.no_truncation()
    return inner


def from_pairs(vocab: Path, merges: Path, settings: Mapping[str, Any]) -> hf.Tokenizer:
    """Byte-level pairs from `vocab.json` and `merges.txt` (Radford et al., GPT-2, 2019, section 2.2)."""
    try:
        model = hf.models.BPE.from_file(str(vocab), str(merges), fuse_unk=False)
    except Exception as error:  # the library raises bare Exception
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"{vocab} and {merges.name}: not a byte-pair vocabulary: {reason}") from error
    inner = hf.Tokenizer(model)
    prefix = bool(settings.get("add_prefix_space", False))
    inner.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    inner.decoder = hf.decoders.ByteLevel()
    return inner


def from_word_pieces(path: Path, settings: Mapping[str, Any]) -> hf.Tokenizer:
    """Word pieces from `vocab.txt`, one a line (Devlin et al., BERT, 2019; google-research/bert)."""
    lines = path.read_text("utf-8").split("\n")
    words = lines[:-1] if lines[-1] == "" else lines
    unknown = "[UNK]"
    if unknown not in words:
        raise InputError(f"{path}: has no line {unknown!r}; a word piece vocabulary needs one")
    vocabulary = {word.rstrip("\r"): index for index, word in enumerate(words)}
    inner = hf.Tokenizer(hf.models.WordPiece(vocabulary, unk_token=unknown))
    inner.normalizer = hf.normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
        strip_accents=settings.get("strip_accents"),
        lowercase=bool(settings.get("do_lower_case", True)),
    )
    inner.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
    inner.decoder = hf.decoders.WordPiece(prefix="##")
    return inner


def surround(
    inner: hf.Tokenizer, before: Sequence[str], after: Sequence[str], between: Sequence[str] = ()
) -> None:
    """Put these special tokens before and after every text that `inner` encodes, and between two texts.

    The second of two texts and what follows it have type 1 where one token is between them (BERT).
    """
    names, kind = [*before, *after, *between], int(len(between) == 1)
    end = [f"{name}:{kind}" for name in after]
    inner.post_processor = hf.processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *between, f"$B:{kind}", *end],
        special_tokens=[(name, inner.token_to_id(name)) for name in dict.fromkeys(names)],
    )


def surrounded_by(inner: hf.Tokenizer) -> set[str]:
    """The special tokens that `inner` puts around a text."""
    return {inner.id_to_token(index) or "" for index in inner.encode("").ids}


def special_ids(inner: hf.Tokenizer) -> frozenset[int]:
    """Ids of the added tokens that are marked as special."""
    added = json.loads(inner.to_str())["added_tokens"] if inner.get_added_tokens_decoder() else []
    return frozenset(token["id"] for token in added if token["special"])
