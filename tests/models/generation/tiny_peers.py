"""Tiny random models of transformers, and prompts for them."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCAB = 101
SMALL = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}


def make(name):
    """A random model of transformers, its continuations varied by large weights."""
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **SMALL)
        model = transformers.GPT2LMHeadModel(config)
    elif name == "llama":
        config = transformers.LlamaConfig(num_key_value_heads=2, tie_word_embeddings=False, **LLAMA, **SMALL)
        model = transformers.LlamaForCausalLM(config)
    elif name == "mistral":
        config = transformers.MistralConfig(num_key_value_heads=1, sliding_window=9, **LLAMA, **SMALL)
        model = transformers.MistralForCausalLM(config)
    elif name == "qwen3":
        config = transformers.Qwen3Config(num_key_value_heads=2, head_dim=16, **LLAMA, **SMALL)
        model = transformers.Qwen3ForCausalLM(config)
    elif name.startswith("opt"):
        large = {"word_embed_proj_dim": 32}
        if name == "opt-350m":
            large = {"word_embed_proj_dim": 16, "do_layer_norm_before": False}
        config = transformers.OPTConfig(
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            **large,
            **SMALL,
        )
        model = transformers.OPTForCausalLM(config)
    else:
        kind = {"feed_forward_proj": "relu"}
        if name == "t5-v1.1":
            kind = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, **SMALL, **kind))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            spread = 0.125 if parameter.shape[0] == VOCAB else 0.375
            parameter.copy_(spread * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    return model.eval()


def prompts(*lengths):
    """Rows of random ids, none of them special."""
    rng = np.random.default_rng(3)
    return [rng.integers(3, VOCAB, length).tolist() for length in lengths]


def pair(name, folder):
    """One model, transformers' and ours read from its files: (theirs, model, params, start of decoder)."""
    from modicum.models.pretrained import load_pretrained

    theirs = make(name)
    theirs.save_pretrained(folder)
    loaded = load_pretrained(folder)
    return theirs, loaded.model, loaded.params, 0 if name.startswith("t5") else None
