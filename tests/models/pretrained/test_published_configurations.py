"""The configurations of well-known checkpoints, key by key as published: read whole, counted exactly."""

import pytest

from modicum.models import Transformer
from modicum.models.costs import parameter_count
from modicum.models.pretrained.registry import family
from modicum.models.pretrained.settings import Settings

BERT = {
    "architectures": ["BertForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "transformers_version": "4.6.0.dev0",
    "type_vocab_size": 2,
    "use_cache": True,
    "vocab_size": 30_522,
}
MULTILINGUAL_BERT = {
    **BERT,
    "directionality": "bidi",
    "pooler_fc_size": 768,
    "pooler_num_attention_heads": 12,
    "pooler_num_fc_layers": 3,
    "pooler_size_per_head": 128,
    "pooler_type": "first_token_transform",
    "vocab_size": 119_547,
}
ROBERTA = {
    "architectures": ["RobertaForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 514,
    "model_type": "roberta",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "type_vocab_size": 1,
    "vocab_size": 50_265,
}
XLM_R = {
    **ROBERTA,
    "architectures": ["XLMRobertaForMaskedLM"],
    "model_type": "xlm-roberta",
    "output_past": True,
    "position_embedding_type": "absolute",
    "use_cache": True,
    "vocab_size": 250_002,
}
T5 = {
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 2048,
    "d_kv": 64,
    "d_model": 512,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "n_positions": 512,
    "num_heads": 8,
    "num_layers": 6,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "task_specific_params": {"summarization": {"max_length": 200, "prefix": "summarize: "}},
    "vocab_size": 32_128,
}
T5_1_1 = {
    **T5,
    "d_ff": 1024,
    "feed_forward_proj": "gated-gelu",
    "num_decoder_layers": 8,
    "num_heads": 6,
    "num_layers": 8,
    "tie_word_embeddings": False,
    "use_cache": True,
}
OPT = {
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "eos_token_id": 2,
    "ffn_dim": 3072,
    "hidden_size": 768,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "prefix": "</s>",
    "torch_dtype": "float16",
    "transformers_version": "4.21.0.dev0",
    "use_cache": True,
    "vocab_size": 50_272,
    "word_embed_proj_dim": 768,
}
OPT_350M = {
    **OPT,
    "do_layer_norm_before": False,
    "ffn_dim": 4096,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "word_embed_proj_dim": 512,
}

PUBLISHED = {
    "bert-base-uncased": (BERT, "BertForMaskedLM", 109_514_298),
    "bert-base-uncased, pooled": (BERT, "BertModel", 109_482_240),
    "bert-base-multilingual-cased": (MULTILINGUAL_BERT, "BertModel", 177_853_440),
    "roberta-base": (ROBERTA, "RobertaForMaskedLM", 124_697_433),
    "roberta-base, pooled": (ROBERTA, "RobertaModel", 124_645_632),
    "xlm-roberta-base": (XLM_R, "XLMRobertaForMaskedLM", 278_295_186),
    "t5-small": (T5, "T5ForConditionalGeneration", 60_506_624),
    "t5-v1_1-small": (T5_1_1, "T5ForConditionalGeneration", 76_961_152),
    "opt-125m": (OPT, "OPTForCausalLM", 125_239_296),
    "opt-350m": (OPT_350M, "OPTForCausalLM", 331_196_416),
}


def model_of(values, architecture):
    """The model of a config.json, every key of which has to be known."""
    found, settings = family(values["model_type"]), Settings(values)
    model = Transformer(found.read(settings), found.head(architecture, settings))
    settings.finish(found.name)
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models(name):
    values, architecture, expected = PUBLISHED[name]
    assert parameter_count(model_of(values, architecture)) == expected


@pytest.mark.peers
@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_counts_as_many(name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    values, architecture, expected = PUBLISHED[name]
    known = {key: value for key, value in values.items() if key != "transformers_version"}
    kind = getattr(transformers, architecture)
    with torch.device("meta"):
        theirs = kind(kind.config_class(**known))
    count = sum(parameter.numel() for parameter in theirs.parameters())
    if name == "t5-v1_1-small":  # `transformers` 5 ties until it meets a file with both matrices
        count += theirs.lm_head.weight.numel()
    assert count == expected
