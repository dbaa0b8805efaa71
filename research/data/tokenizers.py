"""Byte-level byte-pair encoding, trained on any text and kept in one `tokenizer.json`.

Byte-level means that every text can be encoded and comes back exactly: there is no unknown token
(Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, §2.2).
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers as hf

from ... import InputError

__all__ = ["EOS", "PAD", "Tokenizer", "train_tokenizer"]

PAD, EOS = "<pad>", "<eos>"
BYTES = 256


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and the ids of its two special tokens.

    Attributes:
        inner: the `tokenizers.Tokenizer` that does the work.
        pad: id of the token that fills rows; 0 where `train_tokenizer` made it.
        eos: id of the token that ends a document; 1 where `train_tokenizer` made it.
    """

    inner: hf.Tokenizer
    pad: int = 0
    eos: int = 1

    @property
    def vocab(self) -> int:
        """How many ids there are, V."""
        return self.inner.get_vocab_size()

    @property
    def fingerprint(self) -> str:
        """Digest of everything that determines the ids."""
        key = f"{self.inner.to_str()}\n{self.pad}\n{self.eos}"
        return hashlib.sha256(key.encode()).hexdigest()[:16]

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int32 [T], without special tokens; on all cores."""
        encoded = self.inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(each.ids, np.int32) for each in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, without the special tokens among them."""
        return self.inner.decode([int(each) for each in ids], skip_special_tokens=True)

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`, which Hugging Face's libraries read too."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(path).with_name(Path(path).name + ".tmp")
        temporary.write_text(self.inner.to_str(pretty=True), "utf-8")
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path, pad: str = PAD, eos: str = EOS) -> "Tokenizer":
        """Read a `tokenizer.json`; `pad` and `eos` name its special tokens (GPT-2: both `<|endoftext|>`).

        Raises:
            InputError: where the file is missing, is no tokenizer, or lacks one of the two tokens.
        """
        if not Path(path).is_file():
            raise InputError(f"{path}: no such tokenizer file")
        try:
            inner = hf.Tokenizer.from_str(Path(path).read_text("utf-8"))
        except Exception as error:  # the library raises bare Exception
            reason = (str(error).splitlines() or [""])[0]
            raise InputError(f"{path}: not a tokenizer.json: {reason}") from error
        inner.encode_special_tokens = True  # not kept in the file
        return cls(inner, _id_of(inner, pad, path), _id_of(inner, eos, path))


def train_tokenizer(texts: Iterable[str], vocab: int, special: Sequence[str] = ()) -> Tokenizer:
    """Train a byte-level BPE tokenizer of at most `vocab` ids; the same texts give the same tokenizer.

    `<pad>` is 0, `<eos>` is 1, then come `special`, the 256 bytes and the merges. Special tokens are
    never read out of a text: a text that contains "<eos>" is encoded as those five letters.

    Raises:
        InputError: where `vocab` cannot hold the bytes and special tokens, or there is no text.
    """
    names = [PAD, EOS, *special]
    least = BYTES + len(names)
    if vocab < least:
        raise InputError(f"vocab is {vocab}; at least {least} is valid: the bytes and {', '.join(names)}")
    inner = hf.Tokenizer(hf.models.BPE())
    inner.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=names,
        initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(_some(texts), trainer=trainer)
    inner.encode_special_tokens = True
    return Tokenizer(inner)


def _some(texts: Iterable[str]) -> Iterable[str]:
    empty = True
    for text in texts:
        empty = empty and not text
        yield text
    if empty:
        raise InputError("no text to train a tokenizer on")


def _id_of(inner: hf.Tokenizer, name: str, path: Path) -> int:
    number = inner.token_to_id(name)
    if number is None:
        raise InputError(f"{path}: has no token {name!r}; name the padding and end tokens it has")
    return number
