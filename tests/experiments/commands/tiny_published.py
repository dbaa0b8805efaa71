"""Published checkpoints in small: random weights in a folder as the hub has them, with a tokenizer of words.

Loaded by path, by the fixture `tiny_published`.
"""

import json

import jax
import jax.numpy as jnp
import tokenizers as hf

from modicum.models import Transformer
from modicum.models.heads import LanguageModelHead
from modicum.models.pretrained import registry, save_pretrained
from modicum.models.pretrained.settings import Settings
from modicum.models.pretrained.tokenizers.fast import surround

MARKS = ["<pad>", "<unk>", "<s>", "</s>"]
ROLES = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
WIDE = {"initializer_range": 0.2}
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
BERT |= {"hidden_dropout_prob": 0.0, **WIDE}
SETTINGS = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "resid_pdrop": 0.0, **WIDE, **IDS},
    "llama": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        **WIDE,
        **IDS,
    },
    "bert": {**BERT, "max_position_embeddings": 32, "pad_token_id": 0},
    "roberta": {**BERT, "max_position_embeddings": 34, "type_vocab_size": 1, **IDS},
    "t5": {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 1,
        "num_heads": 2,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
        **IDS,
    },
}
ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "t5": "T5ForConditionalGeneration",
}
AROUND = {
    "gpt2": ([], [], []),
    "llama": (["<s>"], [], []),
    "bert": (["<s>"], ["</s>"], ["</s>"]),
    "roberta": (["<s>"], ["</s>"], ["</s>", "</s>"]),
    "t5": ([], ["</s>"], []),
}


def write(folder, name, words):
    """A checkpoint of this family in `folder`, whose tokenizer knows `words`; returns the folder."""
    vocabulary = [*MARKS, *words]
    settings = {"model_type": name, "vocab_size": len(vocabulary), **SETTINGS[name]}
    family, architecture = registry.family(name), ARCHITECTURES[name]
    read = Settings({**settings, "architectures": [architecture]}, (), ())
    read.take("model_type")
    head, config = family.head(architecture, read), family.read(read)
    model = Transformer(config, head)
    tokens = jnp.zeros((1, 2), jnp.int32)
    more = {"decoder_tokens": tokens} if config.kind == "encoder-decoder" else {}
    params = jax.jit(lambda rng: model.init(rng, tokens, **more))(jax.random.key(3))
    save_pretrained(folder, model, params, architecture=architecture, settings=settings)
    assert isinstance(head, LanguageModelHead) == (name in ("gpt2", "llama", "t5"))
    _tokenizer(name, vocabulary).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(ROLES))
    return folder


def _tokenizer(name, vocabulary):
    inner = hf.Tokenizer(hf.models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(MARKS)
    before, after, between = AROUND[name]
    if before or after:
        surround(inner, before, after, between)
    return inner
