"""BERT (Devlin et al., 2019), and what is shaped like it (MiniLM, and most sentence encoders).

`BertModel` ends in its pooler, `[B, D]`, so that nothing of its file is left out; with `head=None`,
`load_pretrained` gives the hidden states `[B, T, D]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .. import MLP, GroupedQuery, LayerNorm, Learned, PostNorm, TransformerConfig
from ..heads import ClassifierHead, Head, MaskedLanguageModelHead, Pooler
from .family import Family, activation, choice, their_activation
from .mapping import Entry, Rows, Transposed, linear, norm
from .settings import Settings

# Left over from the original release's training code; `transformers` does not read them either.
UNUSED = (
    "directionality",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
)
BUFFERS = (r"embeddings\.(position_ids|token_type_ids)$",)


def read(settings: Settings) -> TransformerConfig:
    """The configuration of a BERT."""
    return encoder(settings, Learned(settings.take("max_position_embeddings", 512)))


def encoder(settings: Settings, positions: Learned) -> TransformerConfig:
    """The configuration that BERT and RoBERTa share, with their own positions.

    Our one dropout rate takes the residual branches' (training only).
    """
    settings.require("position_embedding_type", "absolute")
    settings.require("is_decoder", False)
    settings.require("add_cross_attention", False)
    settings.ignore("attention_probs_dropout_prob", "classifier_dropout", *UNUSED)
    return TransformerConfig(
        kind="encoder",
        layers=settings.take("num_hidden_layers", 12),
        width=settings.take("hidden_size", 768),
        vocab=settings.take("vocab_size", 30_522),
        attention=GroupedQuery(settings.take("num_attention_heads", 12)),
        mlp=MLP(settings.take("intermediate_size", 3072), activation(settings, "hidden_act", "gelu")),
        norm=LayerNorm(settings.take("layer_norm_eps", 1e-12)),
        positions=positions,
        residual=PostNorm(),
        tied=settings.take("tie_word_embeddings", True),
        embedding_norm=True,
        token_types=settings.take("type_vocab_size", 2),
        dropout=settings.take("hidden_dropout_prob", 0.1),
        initial_std=settings.take("initializer_range", 0.02),
    )


def write(config: TransformerConfig, architecture: str) -> dict[str, Any]:
    """The keys of config.json that make `config`."""
    length = choice(config, "positions", Learned).max_length
    return {**write_encoder(config), "max_position_embeddings": length}


def write_encoder(config: TransformerConfig) -> dict[str, Any]:
    """The keys that BERT and RoBERTa share."""
    mlp, normalization = choice(config, "mlp", MLP), choice(config, "norm", LayerNorm)
    return {
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "vocab_size": config.vocab,
        "num_attention_heads": config.attention.heads,
        "intermediate_size": mlp.width or 4 * config.width,
        "hidden_act": their_activation(mlp.activation),
        "layer_norm_eps": normalization.epsilon,
        "type_vocab_size": config.token_types,
        "tie_word_embeddings": config.tied,
        "hidden_dropout_prob": config.dropout,
        "initializer_range": config.initial_std,
    }


def entries(config: TransformerConfig, head: Head | None) -> Iterator[Entry]:
    """Every tensor of a BERT with this head."""
    yield from backbone("bert", config)
    if isinstance(head, MaskedLanguageModelHead):
        yield from linear("cls.predictions.transform.dense", "head/transform")
        yield from norm("cls.predictions.transform.LayerNorm", "head/norm")
        yield from word_logits("cls.predictions.decoder", "cls.predictions.bias", config)
    elif isinstance(head, Pooler):
        yield from linear("bert.pooler.dense", "pooler")
    elif isinstance(head, ClassifierHead):
        if head.pooler:
            yield from linear("bert.pooler.dense", "classifier/pooler")
        yield from linear("classifier", "classifier")


def backbone(prefix: str, config: TransformerConfig) -> Iterator[Entry]:
    """The tensors that BERT and RoBERTa share, under `prefix`."""
    table = f"{prefix}.embeddings.word_embeddings.weight"
    again = {"bert": "cls.predictions.decoder.weight", "roberta": "lm_head.decoder.weight"}[prefix]
    also = (again,) if config.tied else ()
    yield Entry(table, "embedding/table", Rows(0, config.vocab), also)
    yield Entry(f"{prefix}.embeddings.position_embeddings.weight", "position_embedding/table")
    yield Entry(f"{prefix}.embeddings.token_type_embeddings.weight", "type_embedding/table")
    yield from norm(f"{prefix}.embeddings.LayerNorm", "embedding_norm")
    for index in range(config.layers):
        theirs, ours = f"{prefix}.encoder.layer.{index}", f"layers_{index}"
        for name in ("query", "key", "value"):
            yield from linear(f"{theirs}.attention.self.{name}", f"{ours}/attention/{name}")
        yield from linear(f"{theirs}.attention.output.dense", f"{ours}/attention/output")
        yield from norm(f"{theirs}.attention.output.LayerNorm", f"{ours}/attention_norm")
        yield from linear(f"{theirs}.intermediate.dense", f"{ours}/mlp/up")
        yield from linear(f"{theirs}.output.dense", f"{ours}/mlp/down")
        yield from norm(f"{theirs}.output.LayerNorm", f"{ours}/mlp_norm")


def word_logits(decoder: str, bias: str, config: TransformerConfig) -> Iterator[Entry]:
    """The last step of a masked-word head, whose bias has two names.

    Tied, these are one parameter. Untied they are two, of which only the decoder's is used: of two entries
    for one leaf the latter is what is read, and both are written.
    """
    rows = Rows(0, config.vocab)
    if config.tied:
        yield Entry(bias, "head/bias", rows, (f"{decoder}.bias",))
    else:
        yield Entry(bias, "head/bias", rows)
        yield Entry(f"{decoder}.bias", "head/bias", rows)
        yield Entry(f"{decoder}.weight", "head/kernel", Rows(0, config.vocab, 1, Transposed()))


def labels(settings: Settings) -> int:
    """How many labels a classifier has; 2 where config.json does not say."""
    names = settings.take("id2label", None)
    return len(names) if names else settings.take("num_labels", 2)


def _masked_words(settings: Settings) -> MaskedLanguageModelHead:
    return MaskedLanguageModelHead(activation(settings, "hidden_act", "gelu"))


FAMILIES = (
    Family(
        name="bert",
        architectures={
            "BertModel": lambda settings: Pooler(),
            "BertForMaskedLM": _masked_words,
            "BertForSequenceClassification": lambda settings: ClassifierHead(
                labels(settings), "first", "tanh"
            ),
        },
        read=read,
        write=write,
        entries=entries,
        prefixes=("bert.",),
        bare=("BertModel",),
        buffers=BUFFERS,
        extras=(r"^cls\.seq_relationship\.", r"^(bert\.)?pooler\.dense\."),
        renamed=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    ),
)
