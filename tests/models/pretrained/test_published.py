"""Configurations as their publishers have them: every key is understood, the parameter counts are exact.

The values are those of the files `config.json` on the Hugging Face hub, the counts those that it shows (for
tied models without the second copy that some files hold).
"""

from dataclasses import replace

import pytest

from modicum.models import Transformer
from modicum.models.costs import abstract_parameters, parameter_count
from modicum.models.pretrained.mapping import place
from modicum.models.pretrained.registry import family
from modicum.models.pretrained.settings import Settings
from modicum.models.rotary import Llama3Scaling

USUAL = {"attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu"}
USUAL |= {
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0",
    "use_cache": True,
}

GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
LLAMA_3_1_8B = {
    **USUAL,
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
TINY_LLAMA = {
    **USUAL,
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
MISTRAL_7B = {
    **USUAL,
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN2_5_HALF_B = {
    **USUAL,
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_0_6B = {
    **USUAL,
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PUBLISHED = {
    "gpt2": (GPT2, 124_439_808),
    "Llama-3.1-8B": (LLAMA_3_1_8B, 8_030_261_248),
    "TinyLlama-1.1B": (TINY_LLAMA, 1_100_048_384),
    "Mistral-7B-v0.1": (MISTRAL_7B, 7_241_732_096),
    "Qwen2.5-0.5B": (QWEN2_5_HALF_B, 494_032_768),
    "Qwen3-0.6B": (QWEN3_0_6B, 596_049_920),
}


@pytest.mark.parametrize(("values", "count"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_models(values, count):
    settings = Settings(values)
    kind = family(values["model_type"])
    head, config = kind.head(values["architectures"][0], settings), kind.read(settings)
    settings.take("model_type")
    settings.finish(kind.name)
    model = Transformer(replace(config, scan=True), head)
    assert parameter_count(model) == count
    # Every leaf has its tensors, and no tensor another leaf than the model's.
    pieces = place(kind.entries(model.config, head), model.config)
    paths = {path for path, _ in flat(abstract_parameters(model))}
    assert set(pieces) == paths


def flat(tree, prefix=""):
    """(path, leaf) of nested dictionaries."""
    for key, value in tree.items():
        yield from flat(value, f"{prefix}{key}/") if isinstance(value, dict) else [(prefix + key, value)]


def test_options_that_the_counts_do_not_show():
    llama = family("llama").read(Settings(LLAMA_3_1_8B))
    assert llama.positions.base == 500_000 and llama.positions.scaling == Llama3Scaling(8.0)
    assert llama.norm.epsilon == 1e-5 and not llama.tied
    assert family("mistral").read(Settings(MISTRAL_7B)).attention.window == 4096
    qwen = family("qwen2").read(Settings(QWEN2_5_HALF_B))
    assert qwen.attention.window == 0 and qwen.pattern == () and qwen.attention.bias and qwen.tied
