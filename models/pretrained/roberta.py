"""RoBERTa (Liu et al., 2019) and XLM-R (Conneau et al., 2020): BERT with other positions and heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .. import Learned, TransformerConfig
from ..heads import ClassifierHead, Head, MaskedLanguageModelHead, Pooler
from .bert import BUFFERS, backbone, encoder, labels, word_logits, write_encoder
from .family import Family, choice
from .mapping import Entry, linear, norm
from .settings import Settings


def read(settings: Settings) -> TransformerConfig:
    """The configuration of a RoBERTa; its first token stands after the padding token's row of positions."""
    padding = settings.take("pad_token_id", 1)
    if padding is None:
        settings.refuse("pad_token_id=None (valid: a token; positions begin after its number)")
    offset = (padding or 0) + 1
    rows = settings.take("max_position_embeddings", 512)
    return encoder(settings, Learned(rows - offset, offset))


def write(config: TransformerConfig, architecture: str) -> dict[str, Any]:
    """The keys of config.json that make `config`."""
    positions = choice(config, "positions", Learned)
    rows = positions.max_length + positions.offset
    return {
        **write_encoder(config),
        "max_position_embeddings": rows,
        "pad_token_id": positions.offset - 1,
    }


def entries(config: TransformerConfig, head: Head | None) -> Iterator[Entry]:
    """Every tensor of a RoBERTa with this head."""
    yield from backbone("roberta", config)
    if isinstance(head, MaskedLanguageModelHead):
        yield from linear("lm_head.dense", "head/transform")
        yield from norm("lm_head.layer_norm", "head/norm")
        yield from word_logits("lm_head.decoder", "lm_head.bias", config)
    elif isinstance(head, Pooler):
        yield from linear("roberta.pooler.dense", "pooler")
    elif isinstance(head, ClassifierHead):
        if head.pooler:
            yield from linear("classifier.dense", "classifier/pooler")
        yield from linear("classifier.out_proj", "classifier")


def _family(name: str, title: str) -> Family:
    return Family(
        name=name,
        architectures={
            f"{title}Model": lambda settings: Pooler(),
            f"{title}ForMaskedLM": lambda settings: MaskedLanguageModelHead(),
            f"{title}ForSequenceClassification": lambda settings: ClassifierHead(
                labels(settings), "first", "tanh"
            ),
        },
        read=read,
        write=write,
        entries=entries,
        prefixes=("roberta.",),
        bare=(f"{title}Model",),
        buffers=BUFFERS,
        extras=(r"^(roberta\.)?pooler\.dense\.",),
    )


FAMILIES = (_family("roberta", "Roberta"), _family("xlm-roberta", "XLMRoberta"))
